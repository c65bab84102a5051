"""The house: imports go down, the public names are these, and no name was forgotten."""

from __future__ import annotations

import ast
import re
import typing
from pathlib import Path

import pytest

import proxy_losses

ROOT = Path(proxy_losses.__file__).parent
# Floor of each room: two rooms on one floor never import each other.
FLOORS = {
    "_effects": 0,
    "_functions": 0,
    "_checks": 0,
    "_old_names": 1,
    "distributed": 1,
    "_numerics": 2,
    "_quantiles": 3,
    "_ranks": 3,
    "_queue": 3,
    "_schedule": 3,
    "_metrics": 4,
    "_lists": 4,
    "_losses": 5,
    "_retrieval": 5,
    "nn": 6,
    "ap_loss": 7,
    "recall_loss": 7,
    "pauc_loss": 7,
    "focal_loss": 7,
    "warmup_wrapper": 7,
    "__init__": 8,
    "integrations": 9,
    "doctor": 9,
    "demo": 10,
}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports, by relative or absolute name."""
    found = set()
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            parts = base + (node.module.split(".") if node.module else [])
            if not node.level:
                if parts[0] != "proxy_losses":
                    continue
                parts = parts[1:]
            found |= {parts[0]} if parts else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                [*a.name.split("."), "__init__"][1]
                for a in node.names
                if a.name.split(".")[0] == "proxy_losses"
            }
    # A name that is no file is taken from the package itself.
    known = {room(f) for f in FILES}
    return {r if r in known else "__init__" for r in found}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    here = room(path)
    for other in imported_rooms(path) - {here}:
        assert FLOORS[other] < FLOORS[here], f"{here} imports {other}, which is not below it"


def test_the_walk_sees_imports():
    """Guard of the guard: an empty walk would pass everything."""
    assert imported_rooms(ROOT / "_losses.py") >= {"_queue", "_metrics", "_lists"}
    assert imported_rooms(ROOT / "nn" / "_ranking.py") >= {"_losses", "_checks"}
    assert imported_rooms(ROOT / "nn" / "_batch.py") >= {"distributed"}
    assert imported_rooms(ROOT / "__init__.py") >= {"nn", "_ranks"}


def test_only_one_file_names_torch_distributed():
    users = [f.name for f in FILES if re.search(r"torch\.distributed\b(?!\.init)", f.read_text())]
    assert set(users) == {"distributed.py", "_proof.py"}  # the doctor starts processes


def test_public_names():
    assert set(proxy_losses.__all__) == {
        "AUROCLoss",
        "MRRLoss",
        "NDCGLoss",
        "QueryLists",
        "LossWarmupWrapper",
        "MemoryState",
        "PAUCAtBudgetLoss",
        "PrecisionAtKLoss",
        "QueueState",
        "RecallAtKLoss",
        "RecallAtPrecisionLoss",
        "RecallAtQuantileLoss",
        "RetrievalLists",
        "RetrievalLoss",
        "Schedule",
        "ScheduleState",
        "SigmoidFocalLoss",
        "SmoothAPLoss",
        "SoftRanks",
        "SoftmaxFocalLoss",
        "__version__",
        "all_gather_no_grad",
        "all_gather_with_grad",
        "blend_weight",
        "enqueue",
        "enqueue_embeddings",
        "query_lists",
        "in_blend",
        "in_warmup",
        "init_memory",
        "init_queue",
        "init_schedule",
        "partial_auc",
        "partial_auc_defined",
        "partial_auc_loss",
        "precision_at_k",
        "precision_at_k_loss",
        "queue_rows",
        "recall_at_k",
        "recall_at_k_loss",
        "recall_at_precision",
        "recall_at_precision_loss",
        "recall_at_quantile",
        "recall_at_quantile_loss",
        "recall_defined",
        "recall_saturation",
        "reset_memory",
        "reset_queue",
        "score_spread",
        "set_debug",
        "retrieval_lists",
        "retrieval_loss",
        "sigmoid_focal",
        "sigmoid_sums",
        "smooth_ap",
        "smooth_ap_defined",
        "smooth_ap_loss",
        "smooth_ap_saturation",
        "smooth_auroc",
        "smooth_auroc_defined",
        "smooth_auroc_loss",
        "smooth_mrr",
        "smooth_mrr_defined",
        "smooth_mrr_loss",
        "smooth_ndcg",
        "smooth_ndcg_defined",
        "smooth_ndcg_loss",
        "soft_ranks",
        "softmax_focal",
        "start_epoch",
        "start_step",
        "state_temp",
        "state_weight",
        "temp_at",
    }
    for name in proxy_losses.__all__:
        assert getattr(proxy_losses, name).__doc__


def test_annotations_can_be_read():
    """As tools do that make a command line or a form of a signature."""
    public = [getattr(proxy_losses, name) for name in proxy_losses.__all__]
    modules = [x for x in public if hasattr(x, "forward")]
    for x in (*filter(callable, public), *(m.__init__ for m in modules)):
        assert typing.get_type_hints(x).keys() >= x.__annotations__.keys()


def test_version_matches_the_changelog():
    changelog = (ROOT.parent / "CHANGELOG.md").read_text()
    assert f"## {proxy_losses.__version__}" in changelog
