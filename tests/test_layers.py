"""The house: imports go down, files stay small, the public names are these."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import proxy_losses

ROOT = Path(proxy_losses.__file__).parent
# floor of each room; two rooms on one floor never import each other
FLOORS = {
    "_effects": -1,
    "_checks": 0,
    "distributed": 0,
    "_numerics": 0.5,
    "_ranks": 1,
    "_schedule": 1,
    "_queue": 1,
    "_metrics": 2,
    "_smooth_ap": 2,
    "_groups": 2,
    "_pool": 2.5,
    "_retrieval": 2,
    "_step": 3,
    "_losses": 3.5,
    "nn": 4,
    "ap_loss": 4.5,
    "recall_loss": 4.5,
    "pauc_loss": 4.5,
    "focal_loss": 4.5,
    "warmup_wrapper": 4.5,
    "__init__": 5,
    "demo": 6,
    "integrations": 6,
    "doctor": 6,
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
    assert imported_rooms(ROOT / "_step.py") >= {"_queue", "_smooth_ap", "_metrics"}
    assert imported_rooms(ROOT / "nn" / "_base.py") >= {"_step", "_checks"}
    assert imported_rooms(ROOT / "nn" / "_batch.py") >= {"distributed"}
    assert imported_rooms(ROOT / "__init__.py") >= {"nn", "_ranks"}


def test_only_one_file_names_torch_distributed():
    users = [f.name for f in FILES if re.search(r"torch\.distributed\b(?!\.init)", f.read_text())]
    assert set(users) == {"distributed.py", "_proof.py"}  # the doctor starts processes


def test_public_names():
    assert set(proxy_losses.__all__) == {
        "QueryLists",
        "LossWarmupWrapper",
        "PAUCAtBudgetLoss",
        "QueueState",
        "RecallAtQuantileLoss",
        "RetrievalLists",
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
        "query_lists",
        "in_blend",
        "in_warmup",
        "init_queue",
        "init_schedule",
        "partial_auc",
        "partial_auc_defined",
        "partial_auc_loss",
        "queue_rows",
        "recall_at_quantile",
        "recall_at_quantile_loss",
        "recall_defined",
        "recall_saturation",
        "reset_queue",
        "score_spread",
        "retrieval_lists",
        "sigmoid_focal",
        "sigmoid_sums",
        "smooth_ap",
        "smooth_ap_defined",
        "smooth_ap_loss",
        "smooth_ap_saturation",
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


def test_version_matches_the_changelog():
    changelog = (ROOT.parent / "CHANGELOG.md").read_text()
    assert f"## {proxy_losses.__version__}" in changelog
