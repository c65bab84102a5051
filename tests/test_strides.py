"""Any stride and storage offset: what a tensor holds decides, not how it lies in memory.

Every public function and module that takes tensors joins CALLS; `test_every_public_name_is_here`
says so where one does not. Layouts are of the same numbers, so values differ by the order of
summation only: both sides are within rtol of the exact one, gradients within 3 rtol of a scale
that is no larger than a few times the largest entry here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import proxy_losses as P

from .compiling import compile_fresh

pytestmark = pytest.mark.slow

RTOL = {torch.float32: 1e-6, torch.float64: 1e-12}


def storage(x: Tensor, *shape: int) -> Tensor:
    """Room whose other places hold what must not be read: NaN, True, or a number out of range."""
    out = torch.empty(shape, dtype=x.dtype)
    fill = float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else 77
    return out.fill_(fill)


def offset(k: int, x: Tensor) -> Tensor:
    flat = storage(x, x.numel() + k)[k:]
    return flat.view(x.shape).copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else stepped(2, x)


def stepped(step: int, x: Tensor) -> Tensor:
    """Every step-th place of the last axis, from the second one on."""
    room = storage(x, *x.shape[:-1], x.shape[-1] * step + 1)[..., 1::step]
    return room[..., : x.shape[-1]].copy_(x)


def columns(x: Tensor) -> Tensor:
    """A narrow window of a wider table."""
    room = storage(x, *x.shape[:-1], x.shape[-1] + 8)[..., 3:-5]
    return room.copy_(x)


def every_other_list(x: Tensor) -> Tensor:
    return storage(x, 2 * x.shape[0] + 1, *x.shape[1:])[1::2].copy_(x)


def last_of_three(x: Tensor) -> Tensor:
    return storage(x, *x.shape, 3)[..., 2].copy_(x)


def flipped(x: Tensor) -> Tensor:
    """A flip of a flip, of transposed memory."""
    return transposed(x.flip(0)).flip(0)


def indexed(x: Tensor) -> Tensor:
    back = torch.arange(x.shape[-1] - 1, -1, -1)
    return transposed(x[..., back])[..., back]


def padded_batch(x: Tensor) -> Tensor:
    """Transposed, with an offset, in a wider table."""
    room = storage(x, *x.shape[::-1][:-1], x.shape[0] + 3)[..., 2:-1]
    return room.permute(*range(x.dim() - 1, -1, -1)).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"offset {k}": functools.partial(offset, k) for k in range(1, 8)},
    "transposed": transposed,
    "every second": functools.partial(stepped, 2),
    "every fifth": functools.partial(stepped, 5),
    "columns": columns,
    "every other list": every_other_list,
    "last of three": last_of_three,
    "flipped": flipped,
    "indexed": indexed,
    "padded": padded_batch,
}


def drawn(lists: int, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rows + lists)
    flags = torch.rand(4, lists, rows, generator=g)
    pos, valid, iid, live = flags < torch.tensor([0.2, 0.8, 0.7, 0.6])[:, None, None]
    pos[:, 0], pos[:, 1] = True, False
    valid[:, :2] = iid[:, :2] = live[:, :2] = True
    scores, weight = torch.randn(2, lists, rows, generator=g, dtype=torch.float64)
    return {
        "scores": scores.to(dtype), "pos": pos, "valid": valid, "iid": iid, "live": live,
        "weight": (weight.abs() + 0.1).to(dtype),
    }  # fmt: skip


def keep(x: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, x, 0.0)


# name -> (scores, pos, valid, weight, iid, live, tau) -> a tensor or several
RANKING: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "smooth_ap": lambda s, p, v, w, iid, live, t: P.smooth_ap(
        s, p, t, valid_mask=v, sample_weight=w
    ),
    "smooth_ap plain": lambda s, p, v, w, iid, live, t: P.smooth_ap(s, p, t),
    "smooth_auroc": lambda s, p, v, w, iid, live, t: P.smooth_auroc(
        s, p, t, valid_mask=v, sample_weight=w
    ),
    "smooth_auroc logistic": lambda s, p, v, w, iid, live, t: P.smooth_auroc(
        s, p, t, surrogate="logistic", valid_mask=v, sample_weight=w
    ),
    "smooth_mrr": lambda s, p, v, w, iid, live, t: P.smooth_mrr(
        s, p, t, valid_mask=v, sample_weight=w
    ),
    "smooth_ndcg": lambda s, p, v, w, iid, live, t: P.smooth_ndcg(
        s, torch.where(p, s.detach().abs(), 0.0), t, k=9, valid_mask=v, sample_weight=w
    ),
    "recall_at_quantile": lambda s, p, v, w, iid, live, t: P.recall_at_quantile(
        s, p, t, quantile=0.2, valid_mask=v, sample_weight=w, interpolation="linear"
    ),
    "partial_auc": lambda s, p, v, w, iid, live, t: P.partial_auc(
        s, p, t, beta=0.4, valid_mask=v, sample_weight=w, iid_mask=iid, live_mask=live,
        pos_numerator="live",
    ),
    "partial_auc pairwise": lambda s, p, v, w, iid, live, t: P.partial_auc(
        s, p, t, beta=0.4, surrogate="pairwise", valid_mask=v, sample_weight=w, iid_mask=iid,
    ),
    "precision_at_k": lambda s, p, v, w, iid, live, t: P.precision_at_k(
        s, p, t, k=(2, 9), valid_mask=v, sample_weight=w
    ),
    "recall_at_k": lambda s, p, v, w, iid, live, t: P.recall_at_k(
        s, p, t, k=5, valid_mask=v, sample_weight=w
    ),
    "recall_at_precision": lambda s, p, v, w, iid, live, t: P.recall_at_precision(
        s, p, t, valid_mask=v, sample_weight=w
    ),
    "partial_auc above a floor": lambda s, p, v, w, iid, live, t: P.partial_auc(
        s, p, t, beta=0.4, min_tpr=0.5, valid_mask=v, sample_weight=w
    ),
    "soft_ranks": lambda s, p, v, w, iid, live, t: P.soft_ranks(s, p, t, valid_mask=v),
    "soft_ranks dense": lambda s, p, v, w, iid, live, t: P.soft_ranks(
        s, p & iid, t, method="dense"
    ),
    "soft_ranks grid": lambda s, p, v, w, iid, live, t: P.soft_ranks(s, p, t, method="grid"),
    "sigmoid_sums": lambda s, p, v, w, iid, live, t: P.sigmoid_sums(
        s, torch.stack([w, keep(w, v)], -1).mT, p, t
    ),
    "sigmoid_sums grid": lambda s, p, v, w, iid, live, t: P.sigmoid_sums(
        s, w[..., None, :], p, t, method="grid"
    ),
    "sigmoid_sums bool": lambda s, p, v, w, iid, live, t: P.sigmoid_sums(
        s, torch.stack([v, iid], -1).mT, p, t
    ),
    "smooth_ap_saturation": lambda s, p, v, w, iid, live, t: P.smooth_ap_saturation(
        s, p, t, valid_mask=v
    ),
    "recall_saturation": lambda s, p, v, w, iid, live, t: P.recall_saturation(
        s, p, t, quantile=0.2, valid_mask=v
    ),
    "smooth_ap_defined": lambda s, p, v, w, iid, live, t: P.smooth_ap_defined(p, v, w),
    "smooth_auroc_defined": lambda s, p, v, w, iid, live, t: P.smooth_auroc_defined(p, v, w),
    "smooth_mrr_defined": lambda s, p, v, w, iid, live, t: P.smooth_mrr_defined(p, v, w),
    "smooth_ndcg_defined": lambda s, p, v, w, iid, live, t: P.smooth_ndcg_defined(p, v, w),
    "recall_defined": lambda s, p, v, w, iid, live, t: P.recall_defined(p, v, w),
    "partial_auc_defined": lambda s, p, v, w, iid, live, t: P.partial_auc_defined(
        s, p, beta=0.4, valid_mask=v, sample_weight=w, iid_mask=iid, live_mask=live
    ),
    "score_spread": lambda s, p, v, w, iid, live, t: P.score_spread(s, v),
    "sigmoid_focal": lambda s, p, v, w, iid, live, t: P.sigmoid_focal(
        s, p.to(s.dtype), sample_weight=w, reduction="none"
    ),
}  # fmt: skip


def batch_of(s: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and targets: multi-label, or class ids of a single class."""
    return s.mT, p.mT if len(s) > 1 else p[0].long()


def loss_call(make: Callable, **options):
    def call(s, p, v, w, iid, live, t):
        loss = make(num_classes=s.shape[0], queue_size=16, temperature=0.1, **options)
        logits, targets = batch_of(s, p)
        given = {"sample_weight": w[0].detach()}
        if make is P.PAUCAtBudgetLoss:
            given["iid_mask"] = iid[0]
        first, second = (loss(logits, targets, **given) for _ in range(2))
        return first, second, *loss.buffers()

    return call


def function_call(fn: Callable, **options):
    def call(s, p, v, w, iid, live, t):
        logits, targets = batch_of(s, p)
        given = {"sample_weight": w[0], **options}
        if fn is P.partial_auc_loss:
            given["iid_mask"] = iid[0]
        ids = {"query_ids": v[0].long()} if fn is P.smooth_ap_loss else {}
        return fn(logits, targets, None, t, **given, **ids)[0]

    return call


def enqueued(s, p, v, w, iid, live, t):
    queue = P.init_queue(7, s.shape[0])
    targets = torch.where(v[0], p[0].long(), -100)
    for _ in range(2):
        queue = P.enqueue(queue, s.mT.detach(), targets)
    return tuple(x for x in (*queue, *P.queue_rows(queue)) if isinstance(x, Tensor))


def in_queries(s, p, v, w, iid, live, t):
    ids = 5 * p[0].long() - 2 * iid[0].long()
    return tuple(P.query_lists(ids.where(live[0], 9), 6, s.shape[1], valid_mask=v[0]))


def retrieved(s, p, v, w, iid, live, t):
    embeddings = s[:, :60].mT
    labels = p[0, :60].long() + 2 * iid[0, :60].long()
    lists = P.retrieval_lists(embeddings, labels)
    return tuple(x for x in lists if isinstance(x, Tensor))


def with_memory(s, p, v, w, iid, live, t):
    embeddings, memory = s[:, :60].mT, P.init_memory(70, s.shape[0])
    labels = p[0, :60].long() + 2 * iid[0, :60].long()
    memory = P.enqueue_embeddings(memory, embeddings.detach(), labels)
    loss, memory = P.retrieval_loss(embeddings, labels, memory, 0.3)
    return loss, *memory


def retrieval_module(s, p, v, w, iid, live, t):
    labels = p[0, :60].long() + 2 * iid[0, :60].long()
    module = P.RetrievalLoss(memory_size=70, embedding_dim=s.shape[0])
    return tuple(module(s[:, :60].mT, labels) for _ in range(2))


def wrapped(s, p, v, w, iid, live, t):
    loss = P.LossWarmupWrapper(
        warmup_loss=P.SigmoidFocalLoss() if len(s) == 1 else torch.nn.CrossEntropyLoss(),
        main_loss=P.SmoothAPLoss(num_classes=s.shape[0], queue_size=16),
        warmup_epochs=1, blend_epochs=3, temp_start=0.5, temp_end=0.1, temp_decay_steps=5,
    )  # fmt: skip
    loss.on_train_epoch_start(2)
    loss.on_train_batch_start(2)
    ids = torch.where(v, s, s - 9.0).detach().argmax(0)
    return loss(s.mT, ids if len(s) > 1 else p.mT.to(s.dtype))


MODULES: dict[str, Callable] = {
    "SmoothAPLoss": loss_call(P.SmoothAPLoss),
    "RecallAtQuantileLoss": loss_call(P.RecallAtQuantileLoss, quantile=0.2),
    "PAUCAtBudgetLoss": loss_call(P.PAUCAtBudgetLoss, beta=0.4),
    "AUROCLoss": loss_call(P.AUROCLoss, surrogate="logistic"),
    "MRRLoss": loss_call(P.MRRLoss),
    "NDCGLoss": loss_call(P.NDCGLoss),
    "PrecisionAtKLoss": loss_call(P.PrecisionAtKLoss, k=5),
    "RecallAtKLoss": loss_call(P.RecallAtKLoss, k=5),
    "RecallAtPrecisionLoss": loss_call(P.RecallAtPrecisionLoss),
    "smooth_ap_loss": function_call(P.smooth_ap_loss),
    "smooth_auroc_loss": function_call(P.smooth_auroc_loss),
    "smooth_mrr_loss": function_call(P.smooth_mrr_loss),
    "smooth_ndcg_loss": function_call(P.smooth_ndcg_loss),
    "recall_at_quantile_loss": function_call(P.recall_at_quantile_loss, quantile=0.2),
    "partial_auc_loss": function_call(P.partial_auc_loss, beta=0.4),
    "precision_at_k_loss": function_call(P.precision_at_k_loss, k=5),
    "recall_at_k_loss": function_call(P.recall_at_k_loss, k=5),
    "recall_at_precision_loss": function_call(P.recall_at_precision_loss),
    "SigmoidFocalLoss": lambda s, p, v, w, iid, live, t: P.SigmoidFocalLoss()(
        s.mT, p.mT.to(s.dtype), sample_weight=w.mT.detach()
    ),
    "SoftmaxFocalLoss": lambda s, p, v, w, iid, live, t: P.SoftmaxFocalLoss()(
        torch.cat([s, -s]).mT, torch.where(v[0], p[0].long(), -100), sample_weight=w[0].detach()
    ),
    "softmax_focal": lambda s, p, v, w, iid, live, t: P.softmax_focal(
        torch.stack([s, -s], 1), p.long(), sample_weight=w.detach(), reduction="none"
    ),
    "enqueue": enqueued,
    "queue_rows": enqueued,
    "query_lists": in_queries,
    "retrieval_lists": retrieved,
    "retrieval_loss": with_memory,
    "enqueue_embeddings": with_memory,
    "RetrievalLoss": retrieval_module,
    "LossWarmupWrapper": wrapped,
}
CALLS = {**RANKING, **MODULES}
# No tensors of a list or batch among their arguments; or tested with their processes.
OTHERS = {
    "MemoryState", "QueryLists", "QueueState", "RetrievalLists", "Schedule", "ScheduleState",
    "SoftRanks", "__version__", "all_gather_no_grad", "all_gather_with_grad", "blend_weight",
    "in_blend", "in_warmup", "init_memory", "init_queue", "init_schedule", "reset_memory",
    "reset_queue", "set_debug", "start_epoch", "start_step", "state_temp", "state_weight",
    "temp_at",
}  # fmt: skip


def test_every_public_name_is_here():
    covered = {name.split()[0] for name in CALLS}
    assert covered | OTHERS >= set(P.__all__)


def run(call: Callable, given: dict[str, Tensor], tau: Tensor) -> tuple[list[Tensor], list]:
    """Everything that a call returns, and the gradients of an uneven sum of it."""
    leaves = {
        k: x.detach().requires_grad_() if x.is_floating_point() else x for k, x in given.items()
    }
    tau = tau.detach().requires_grad_()
    names = ("scores", "pos", "valid", "weight", "iid", "live")
    out = call(*(leaves[k] for k in names), tau)
    out = list(out) if isinstance(out, tuple) else [out]
    floats = [x for x in out if x.is_floating_point() and x.requires_grad]
    grads: list = []
    if floats:
        total = sum((x * torch.linspace(0.5, 1.5, x.numel()).view(x.shape)).sum() for x in floats)
        by = (leaves["scores"], leaves["weight"], tau)
        grads = list(torch.autograd.grad(total, by, allow_unused=True))
    return [x.detach() for x in out], grads


def assert_same(got: tuple[list, list], want: tuple[list, list], dtype: torch.dtype) -> None:
    for a, b in zip(got[0], want[0], strict=True):
        if b.is_floating_point():
            # 2 rtol: both may be off, to either side.
            torch.testing.assert_close(a, b, rtol=2 * RTOL[dtype], atol=RTOL[dtype])
        else:
            assert torch.equal(a, b)
    for a, b in zip(got[1], want[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            largest = max(b.abs().max().item(), 1e-3)
            if not b.dim():  # tau's: of the size of all values over tau, before they cancel
                sizes = (x.double().abs().sum() for x in want[0] if x.is_floating_point())
                largest = float(sum(sizes)) / TAU.item()
            torch.testing.assert_close(a, b, rtol=0.0, atol=10 * RTOL[dtype] * largest)


TAU = torch.tensor(0.2, dtype=torch.float64)
SHAPES = [(3, 50), (1, 60), (2, 1_200)]
LONG = [(1, 20_011), (2, 21_000)]  # where near-linear sums have begun


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_any_layout(name, shape, dtype):
    given = drawn(*shape, dtype)
    want = run(CALLS[name], given, TAU)
    for kind, layout in LAYOUTS.items():
        moved = {k: layout(x) for k, x in given.items()}
        assert all(torch.equal(moved[k], x) for k, x in given.items())
        try:
            got = run(CALLS[name], moved, TAU)
            assert_same(got, want, dtype)
        except Exception as error:
            raise AssertionError(f"{kind}: {error}") from error


FEW = ["offset 1", "offset 3", "transposed", "every second", "columns", "padded"]


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_any_layout_of_long_lists(name, shape):
    if "dense" in name:
        pytest.skip("exact pairs of so many rows")
    given = drawn(*shape, torch.float32)
    want = run(CALLS[name], given, TAU)
    for kind in FEW:
        moved = {k: LAYOUTS[kind](x) for k, x in given.items()}
        try:
            assert_same(run(CALLS[name], moved, TAU), want, torch.float32)
        except Exception as error:
            raise AssertionError(f"{kind}: {error}") from error


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("rows", [60, 20_001])
def test_one_list_of_any_layout(name, rows):
    """No leading axis at all."""
    if "dense" in name and rows > 1_000:
        pytest.skip("exact pairs of so many rows")
    given = {k: x[0] for k, x in drawn(1, rows, torch.float32).items()}
    want = run(CALLS[name], given, TAU)
    for kind in [f"offset {k}" for k in range(1, 8)] + ["every second", "last of three"]:
        moved = {k: LAYOUTS[kind](x) for k, x in given.items()}
        assert_same(run(CALLS[name], moved, TAU), want, torch.float32)


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("rows", [60, 1_200, 20_001])
@pytest.mark.parametrize("which", ["all", "scores", "masks", "weight"])
def test_lists_that_share_memory(name, rows, which):
    """Stride 0 over the lists."""
    if "dense" in name and rows > 1_200:
        pytest.skip("exact pairs of so many rows")
    given = {k: x.expand(3, -1) for k, x in drawn(1, rows, torch.float32).items()}
    want = run(CALLS[name], {k: x.contiguous() for k, x in given.items()}, TAU)
    shared = {
        "all": list(given), "scores": ["scores"], "masks": ["pos", "valid", "iid", "live"],
        "weight": ["weight"],
    }[which]  # fmt: skip
    moved = {k: x if k in shared else x.contiguous() for k, x in given.items()}
    assert_same(run(CALLS[name], moved, TAU), want, torch.float32)


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("rows", [60, 20_001])
def test_rows_that_share_memory(name, rows):
    """Stride 0 over the rows: one weight, one flag, one score for all."""
    if "dense" in name and rows > 1_000:
        pytest.skip("exact pairs of so many rows")
    given = drawn(2, rows, torch.float32)
    for shared in (["weight"], ["valid"], ["scores"], ["iid", "live", "valid", "weight"]):
        moved = {
            k: x[:, :1].clone().expand(-1, rows) if k in shared else x for k, x in given.items()
        }
        want = run(CALLS[name], {k: x.contiguous() for k, x in moved.items()}, TAU)
        assert_same(run(CALLS[name], moved, TAU), want, torch.float32)


@pytest.mark.parametrize(
    ("kinds", "rows"),
    [(("transposed", "offset 1"), 60), (("transposed", "transposed"), 2_000),
     (("columns", "every second"), 60)],
)  # fmt: skip
def test_layouts_under_inductor(kinds, rows):
    """Everything in one program; scores lie one way and masks another."""
    given = drawn(3, rows, torch.float32)
    moved = {
        k: LAYOUTS[kinds[0] if k in ("scores", "valid") else kinds[1]](x) for k, x in given.items()
    }
    names = ["smooth_ap", "recall_at_quantile", "partial_auc", "partial_auc pairwise", "soft_ranks"]

    def every(*args: Tensor) -> tuple[Tensor, ...]:
        found = [RANKING[name](*args) for name in names]
        return (*found[:4], found[4].all, found[4].pos)

    want = run(every, given, TAU)
    compiled, _ = compile_fresh(every)
    assert_same(run(compiled, moved, TAU), want, torch.float32)
