"""Nothing waits for a device: every function and module on meta, where a read of a value raises.

What `launches.watched` says of copies holds too. Functions and modules are taken from the records.
"""

from __future__ import annotations

import functools
import inspect
import itertools

import pytest
import torch
from torch import Tensor

import proxy_losses as P
from proxy_losses._checks import INTERPOLATIONS
from proxy_losses._metrics import METRICS
from proxy_losses._retrieval import BY_NAME
from proxy_losses.nn import _late

from .launches import launches, watched
from .makers import MAKERS, every_loss, pauc
from .metrics import EXAMPLES, every_metric

META = torch.device("meta")
every_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=list(EXAMPLES))
pytestmark = pytest.mark.filterwarnings("ignore:.*(max_pool_size|on_train_batch_start)")


def scores(*shape: int) -> Tensor:
    return torch.empty(shape, device=META, requires_grad=True)


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)


def mask(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device=META)


def ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=META)


def back(value: Tensor, *inputs: Tensor) -> None:
    """Backward of a value to every input, which has a gradient afterwards."""
    (value.sum() if value.dim() else value).backward()
    assert all(x.grad is not None for x in inputs)


# -- what the watch sees


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.ones(3).to(x.device),
        lambda x: torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: torch.as_tensor(1.0, device=x.device),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
        lambda x: x[torch.tensor([0])],
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_the_watch_sees_reads_and_copies(wait):
    x = floats(3)
    with watched(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        wait(x)


def test_the_watch_counts_kernels():
    x = floats(3, 4)
    with watched() as seen:
        y = x.detach()[:, 1:].T.reshape(9).view(3, 3)  # one copy
        torch.where(y > 0, y, 0.0).sort()
        torch.ones(4) + 1  # on the host
    assert [name for name, _ in seen] == ["clone", "gt", "scalar_tensor", "where", "sort"]
    assert launches(seen) == 8
    with watched() as seen:
        P.soft_ranks(x, mask(3, 4), 0.1)
    assert ("pair_sums", 8) in seen


# -- functions of lists

TAUS = {
    "number": lambda lists: 0.1,
    "on the host": lambda lists: torch.tensor(0.1),
    "on the device": lambda lists: torch.empty((), device=META, requires_grad=True),
    "of each list": lambda lists: torch.empty(lists, dtype=torch.float64, device=META),
}


@every_example
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("shape", [(20,), (3, 20), (2, 3, 20), (0,), (3, 0)], ids=str)
def test_metrics(example, tau, shape):
    function = functools.partial(example.metric.function, **example.settings)
    every = {"valid_mask": mask(*shape), "sample_weight": floats(*shape).requires_grad_()}
    for given in ({}, {"valid_mask": mask(*shape[-1:])}, every):
        s, unit = scores(*shape), TAUS[tau](shape[:-1])
        with watched():
            wants = isinstance(unit, Tensor) and unit.requires_grad
            back(function(s, mask(*shape), unit, **given), s, *([unit] if wants else []))
            with torch.no_grad():
                function(s, mask(*shape), unit, **given)


@every_metric
def test_which_lists_count(metric):
    with watched():
        metric.counts(scores(3, 9), mask(3, 9), mask(3, 9), floats(3, 9))


@every_example
@pytest.mark.parametrize("rows", [20, 5000])
def test_every_option(example, rows):
    """Each choice of each option, with masks that some metrics alone take."""
    metric = example.metric
    choices = [{o.name: x} for o in metric.options for x in o.choices]
    masks = [f"{name}_mask" for name in ("iid", "live")]
    code = metric.function.__code__
    given = {n: mask(2, rows) for n in masks if n in code.co_varnames[: code.co_kwonlyargcount + 3]}
    for chosen in choices:
        s, settings = scores(2, rows), {**example.settings, **chosen}
        with watched():
            back(metric.function(s, mask(2, rows), 0.1, **settings, **given), s)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("rows", [20, 100_000])
def test_thresholds(interpolation, rows):
    for quantile in (0.005, 0.4, 0.9):
        how = {"quantile": quantile, "interpolation": interpolation}
        for valid in (None, mask(rows)):
            with watched():
                P.recall_at_quantile(scores(2, rows), mask(2, rows), 0.1, valid_mask=valid, **how)
                P.recall_saturation(scores(2, rows), mask(2, rows), 0.1, valid_mask=valid, **how)


def test_ranks_spreads_and_lists():
    tau, valid = torch.tensor(0.1), mask(3, 20)
    with watched():
        s, weights, unit = scores(3, 20), scores(3, 2, 20), scores(3)
        back(P.sigmoid_sums(s, weights, mask(3, 20), unit), s, weights, unit)
        back(P.soft_ranks(s, mask(3, 20), tau, valid_mask=valid).all, s)
        P.smooth_ap_saturation(s, mask(3, 20), tau, valid_mask=valid)
        P.score_spread(s, valid)
        P.score_spread(scores(3, 70_000))
        P.query_lists(ids(9), 3, 4, valid_mask=mask(9))
        x, refs = scores(9, 4), scores(5, 4)
        back(P.retrieval_lists(x, ids(9)).scores, x)
        given = {"ref_embeddings": refs, "ref_labels": mask(5, 3), "similarity": "dot"}
        back(P.retrieval_lists(x, mask(9, 3), **given).scores, x, refs)


@pytest.mark.parametrize("gamma", [2.0, 1.5, torch.tensor(2.0), torch.empty((), device=META)])
def test_focal_losses(gamma):
    for reduction in P.SigmoidFocalLoss.SUPPORTED_REDUCTIONS:
        with watched():
            x, how = scores(6, 3), {"gamma": gamma, "reduction": reduction}
            back(P.sigmoid_focal(x, floats(6, 3), sample_weight=floats(6, 1), **how), x)
    for reduction in P.SoftmaxFocalLoss.SUPPORTED_REDUCTIONS:
        for alpha in (None, [0.2, 0.3, 0.4], floats(3)):
            with watched():
                x, how = scores(6, 3), {"gamma": gamma, "reduction": reduction, "alpha": alpha}
                value = P.softmax_focal(
                    x, ids(6), label_smoothing=0.1, sample_weight=floats(6), **how
                )
                back(value, x)


# -- state


@pytest.mark.parametrize("at", ["number", "host", "device"])
@pytest.mark.parametrize("home", ["cpu", "meta"])
def test_schedules(at, home):
    schedule = P.Schedule(3, 4, temp_start=torch.tensor(0.1, dtype=torch.float64))
    step = {"number": 7, "host": torch.tensor(7), "device": ids()}[at]
    state = P.init_schedule(schedule, device=home)
    with watched():
        for function in (P.temp_at, P.blend_weight, P.in_warmup, P.in_blend):
            function(step, schedule)
        for clock in ("step", "epoch"):
            _, state = P.start_epoch(state, step, schedule, clock=clock)
            _, state = P.start_step(state, step, schedule, clock=clock)
            P.state_temp(state, schedule)
            P.state_weight(state, schedule, clock=clock)
    devices = {x.device.type for x in state}
    assert devices == {"meta" if "device" in (at,) or home == "meta" else "cpu"}


@pytest.mark.parametrize("n", [0, 3, 8, 20])
def test_queues(n):
    queue = P.init_queue(8, 2, device=META)
    with watched():
        rows = scores(n, 2)
        more = {"sample_weight": floats(n), "iid_mask": mask(n), "query_ids": ids(n)}
        P.queue_rows(P.enqueue(queue, rows, ids(n)))
        for where in (None, mask()):
            P.reset_queue(P.enqueue(queue, rows, mask(n, 2), **more, where=where))


# -- losses


@pytest.mark.parametrize(("name", "labels"), [("ap", 3), *((name, None) for name in BY_NAME)])
def test_retrieval_losses(name, labels):
    """The module, alone and with its memory, and the function; in a wrapper's blend too."""
    known = {"memory_size": 8, "embedding_dim": 4, "num_labels": labels}
    loss_fn = P.RetrievalLoss(name, **known).to(META)
    wrapper = P.LossWarmupWrapper(lambda x, y: (x * x).mean(), loss_fn, blend_steps=9,
                                  warmup_steps=0)  # fmt: skip
    memory = P.init_memory(8, 4, num_labels=labels, device=META)
    addresses = [id(buffer) for buffer in loss_fn.buffers()]
    for n in (6, 9) if name == "ap" else (6,):
        tags = ids if labels is None else lambda rows: mask(rows, labels)
        x, refs, more = scores(n, 4), scores(5, 4), {"row_ids": ids(n)}
        given = {"ref_embeddings": refs, "ref_labels": tags(5), "ref_row_ids": ids(5)}
        with watched():
            wrapper.on_train_batch_start(n)
            for call, training in itertools.product((loss_fn, wrapper), (False, True)):
                back(call.train(training)(x, tags(n), **more), x)
            back(loss_fn(x, tags(n), **more, **given), x, refs)
            loss, memory = P.retrieval_loss(x, tags(n), memory, floats(), metric=name)
            back(loss, x)
            for grades in (mask(n, 5), floats(n, 5)):
                back(P.RetrievalLoss(name)(x, grades, refs), x, refs)
            P.reset_memory(memory)
    assert [id(buffer) for buffer in loss_fn.buffers()] == addresses


@every_example
@pytest.mark.parametrize("classes", [1, 10])
@pytest.mark.parametrize("capacity", [None, 8])
def test_loss_functions(example, classes, capacity):
    function = getattr(P, f"{example.metric.name}_loss")
    queue = None if capacity is None else P.init_queue(capacity, classes, device=META)
    calls = [
        {"reduction": "none"},
        {"reduction": "sum", "sample_weight": floats(6)},
        {"query_ids": ids(6), "query_shape": (3, 4)},
    ]
    taus = (0.1, torch.tensor(0.1), floats(), floats(classes))
    for k, given in enumerate([{}, *calls]):
        x = scores(6, classes)
        with watched():
            value, _ = function(x, ids(6), queue, taus[k], **example.settings, **given)
            back(value, x)


CALLS = [
    {},
    {"return_per_class": True, "return_diagnostics": True},
    {"sample_weight": floats(6), "iid_mask": mask(6)},
    {"sample_weight": ids(6)},
]
OPTIONS = [
    {},
    {"reduction": "none"},
    {"temperature_unit": "spread"},
    {"max_pool_size": 7},
    {"query_shape": (3, 4)},
    {"surrogate": "pairwise"},
    {"threshold_grad": "implicit"},
    {"threshold_grad": "none"},
    {"k": (3, 500)},
]


def takes(make, options) -> bool:
    known = inspect.signature(type(make())).parameters.keys()
    if "surrogate" in options and make is not pauc:
        return False
    return options.keys() <= known and not ("k" in options and make()._graded)  # of one k


@pytest.mark.parametrize("classes", [1, 10])
@pytest.mark.parametrize("capacity", [0, 4])
@pytest.mark.parametrize(
    ("make", "options"),
    [(m, o) for m in MAKERS for o in OPTIONS if takes(m, o)],
    ids=lambda x: str(x) if isinstance(x, dict) else x.__name__,
)
def test_modules(make, options, classes, capacity):
    query = {"query_ids": ids(6)} if "query_shape" in options else {}
    kinds = [ids(6), floats(6)] + ([mask(6, classes), floats(6, classes)] if classes > 1 else [])
    for targets in kinds:
        module = make(num_classes=classes, queue_size=capacity, **options).to(META)
        for training, given in itertools.product((True, False), CALLS):
            module.train(training)
            x = scores(6, classes)
            with watched():
                out = module(x, targets, **given, **query)
                back(out[0] if isinstance(out, tuple) else out, x)
        with watched():
            module.reset_queue()


def addresses(module: torch.nn.Module) -> list[int]:
    return [id(buffer) for buffer in module.buffers()]


@every_loss
def test_buffers_keep_their_addresses(make):
    module = make(num_classes=3).to(META)
    before = addresses(module)
    for given in CALLS:
        module(scores(6, 3), ids(6), **given)
    module.temperature = 0.5
    module.reset_queue()
    assert addresses(module) == before


@pytest.mark.parametrize("reduction", P.SoftmaxFocalLoss.SUPPORTED_REDUCTIONS)
def test_focal_modules(reduction):
    softmax = P.SoftmaxFocalLoss([1.0, 2.0, 3.0], reduction=reduction).to(META)
    for weight in (None, floats(6)):
        with watched():
            x = scores(6, 3)
            back(softmax(x, ids(6), sample_weight=weight), x)
    if reduction in P.SigmoidFocalLoss.SUPPORTED_REDUCTIONS:
        sigmoid = P.SigmoidFocalLoss(reduction=reduction).to(META)
        for weight in (None, floats(6, 1)):
            with watched():
                x = scores(6, 3)
                back(sigmoid(x, floats(6, 3), sample_weight=weight), x)


@every_loss
@pytest.mark.parametrize(
    "phases",
    [
        {"warmup_steps": 2, "blend_steps": 2},
        {"warmup_epochs": 1, "blend_epochs": 2, "reset_queue_each_epoch": True},
    ],
    ids=["steps", "epochs"],
)
def test_wrappers(make, phases):
    """Warmup, blend and decay."""
    wrapper = P.LossWarmupWrapper(P.SoftmaxFocalLoss(), make(num_classes=3), **phases).to(META)
    weights = []
    for step in range(6):
        for training in (True, False):
            wrapper.train(training)
            with watched():
                wrapper.on_train_epoch_start(step)
                wrapper.on_train_batch_start(step)
                x = scores(6, 3)
                back(wrapper(x, ids(6), sample_weight=floats(6)), x)
        weights.append(wrapper.main_weight)
    assert weights[0] == 0 < weights[2] < weights[-1] == 1


# -- launches


def step(make, classes: int = 1, batch: int = 512, **options) -> int:
    """Launches of a training step of the default loss, forward and backward."""
    module = type(make())(classes, queue_size=1024, **options).to(META)
    x = scores(batch, classes)
    given = {"query_ids": ids(batch)} if "query_shape" in options else {}
    with watched() as seen:
        back(module(x, ids(batch), **given), x)
    return launches(seen)


REACHED = {"smooth_ap": 22, "recall_at_quantile": 28, "partial_auc": 30, "precision_at_k": 36}
REACHED |= {"recall_at_k": 31, "smooth_auroc": 30, "smooth_mrr": 14, "recall_at_precision": 24}


@every_loss
def test_launches_of_a_step(make):
    assert step(make) <= REACHED.get(make.__name__, 40)


class Never:
    """An answer that does not arrive."""

    def __init__(self, numbers):
        assert all(x.dim() == 0 for x in numbers)
        self.count = len(numbers)

    def arrived(self):
        return False


@every_loss
def test_launches_of_the_questions(make, monkeypatch):
    """What is asked of values: at most eleven kernels, and a copy for each number."""
    for classes in (1, 10):
        plain = step(make, classes)
        asked = []
        with monkeypatch.context() as patch:
            patch.setattr(_late, "carrier", lambda x, to=asked: lambda n: to.append(n) or Never(n))
            assert step(make, classes) <= plain + 11
        assert len(asked) == 1
        assert len(asked[0]) <= 4


@every_loss
def test_launches_do_not_grow(make):
    """With classes, lists, rows or stored rows."""
    one, few, many = (step(make, classes) for classes in (1, 10, 100))
    assert few == many <= one + 18
    query = [step(make, 3, query_shape=(lists, 40)) for lists in (4, 40)]
    assert query[0] == query[1]
    assert step(make, batch=64) == one


@every_example
def test_launches_of_a_metric_do_not_grow(example):
    function = functools.partial(example.metric.function, **example.settings)
    found = []
    for shape in ((1, 50), (7, 50), (2, 7, 500)):
        with watched() as seen:
            s = scores(*shape)
            back(function(s, mask(*shape), 0.1), s)
        found.append(launches(seen))
    assert found[0] == found[1] <= found[2] <= found[0] + 2  # an expanded gradient is copied


def test_every_metric_is_here():
    assert {make.__name__ for make in MAKERS} == {m.name for m in METRICS}
    assert {e.metric.name for e in EXAMPLES.values()} == {m.name for m in METRICS}
