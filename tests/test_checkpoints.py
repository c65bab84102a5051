"""Checkpoints that do not fit change nothing; the temperature is saved; copies decide anew."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import proxy_losses as P
from proxy_losses.nn import _batch

from .makers import batch, every_loss, smooth
from .test_wrapper import EPOCHS, STEPS

# Two queries of a few rows: partial AUC may find no spread in one.
pytestmark = pytest.mark.filterwarnings("ignore:.*dispersion")
OPTIONS = {"num_classes": 3, "queue_size": 6, "max_pool_size": 50}
NEW = {f"_queue._q_{name}" for name in ("labels", "multi_label", "owner", "seal", "mark")}


def contents(module: nn.Module) -> dict:
    """All that a checkpoint would hold, apart from the module."""
    return copy.deepcopy(dict(module.state_dict()))


def equal(a: dict, b: dict) -> bool:
    tensors = {k for k, x in a.items() if isinstance(x, torch.Tensor)}
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if k in tensors else a[k] == b[k] for k in a
    )


def used(make, seed: int = 0, query_ids: bool = True, **options) -> nn.Module:
    """A loss with rows, a draw and a temperature of its own."""
    module = make(**{**OPTIONS, **options})
    for k in range(2):
        logits, targets = batch(10 * seed + k, 5, module.num_classes)
        ids = torch.arange(5) % 2 if query_ids else None
        module(logits, targets, torch.arange(5) > k, sample_weight=torch.rand(5), query_ids=ids)
    module.temperature = 0.3 + seed
    return module


def wrapped(main, step: int = 0, **mode) -> P.LossWarmupWrapper:
    wrapper = P.LossWarmupWrapper(nn.CrossEntropyLoss(), main, **(mode or STEPS))
    if step:
        wrapper.on_train_epoch_start(step // 3)
        wrapper.on_train_batch_start(step)
    return wrapper


# -- the temperature of a loss that is used without a wrapper


@every_loss
def test_a_temperature_set_by_hand_is_saved(make, tmp_path):
    module, resumed = used(make), make(**OPTIONS, temperature=0.9)
    torch.save(module.state_dict(), tmp_path / "loss")
    resumed.load_state_dict(torch.load(tmp_path / "loss", weights_only=True))
    assert resumed.temperature == module.temperature == 0.3
    assert torch.equal(resumed(*batch(9, classes=3)), module(*batch(9, classes=3)))
    resumed.temperature = 0.7  # its own, not the checkpoint's tensor
    assert (module.temperature, float(module._tau)) == (0.3, 0.3)


@every_loss
@pytest.mark.parametrize("assign", [False, True])
def test_without_one_in_the_checkpoint_the_constructor_has_its_say(make, assign):
    saved = {k: x for k, x in contents(used(make)).items() if not k.endswith("_tau")}
    module, twin = make(**OPTIONS, temperature=0.9), make(**OPTIONS, temperature=0.9)
    module.load_state_dict(saved, strict=True, assign=assign)
    assert (module.temperature, float(module._tau)) == (0.9, 0.9)
    twin.load_state_dict({**saved, "_tau": torch.tensor(0.9, dtype=torch.float64)})
    assert torch.equal(module(*batch(9, classes=3)), twin(*batch(9, classes=3)))


def test_the_wrapper_and_its_loss_save_the_same_temperature():
    wrapper, resumed = (wrapped(smooth(**OPTIONS), **STEPS) for _ in "ab")
    wrapper.on_train_batch_start(9)
    saved = contents(wrapper)
    assert wrapper.current_temperature == saved["main_loss._tau"].item()
    resumed.load_state_dict(saved)
    assert resumed.current_temperature == wrapper.current_temperature
    assert equal(contents(resumed), saved)


# -- checkpoints that do not fit


def without(*names):
    return lambda saved: [saved.pop("_queue." + n) for n in names]


def put(name, value):
    return lambda saved: saved.update({name: value})


CHANGED = [  # what is done to a good checkpoint, what the error must say
    (put("_queue._q_logits", torch.zeros(5, 3)), "queue_size=5.*queue_size=6"),
    (put("_queue._q_logits", torch.zeros(6, 2)), "num_classes=2.*num_classes=3"),
    (put("_queue._q_logits", torch.zeros(6)), r"_q_logits: expected \[6, 3\], got \[6\]"),
    (put("_queue._q_targets", torch.zeros(5, dtype=torch.int64)), r"_q_targets.*got \[5\]"),
    (put("_queue._q_targets", torch.zeros(6, 3, dtype=torch.int64)), "_q_targets.*bool"),
    (put("_queue._q_weight", torch.zeros(7)), r"_q_weight: expected \[6\], got \[7\]"),
    (put("_queue._q_iid", torch.zeros(0, dtype=torch.bool)), r"_q_iid: expected \[6\], got \[0\]"),
    (put("_queue._q_query_ids", torch.zeros(3, dtype=torch.int64)), r"\[0\] or \[6\], got \[3\]"),
    (put("_queue._q_enqueued", torch.tensor([1, 2])), "_q_enqueued"),
    (put("_queue._q_enqueued", torch.tensor(-1)), "0 rows or more, got -1"),
    (put("_queue._q_logits", "rows"), "_q_logits must be a tensor, got str"),
    (without("_q_weight", "_q_iid"), "lacks _q_iid, _q_weight"),
    (without("_q_logits"), "lacks _q_logits"),
    (put("_tau", torch.tensor(math.nan)), "_tau must be positive"),
    (put("_tau", torch.tensor(-1.0)), "_tau must be positive"),
    (put("_tau", torch.ones(2)), "_tau must be a tensor of one number"),
    (put("_tau", 0.1), "_tau must be a tensor of one number"),
    (put("_draws", torch.tensor(1.5)), "_draws must be an integer"),
]


@every_loss
@pytest.mark.parametrize("where", ["alone", "inside", "wrapper"])
@pytest.mark.parametrize(("change", "says"), CHANGED)
def test_a_loss_that_does_not_fit_keeps_all_it_has(make, where, change, says):
    saved, module = contents(used(make, 1)), used(make)
    change(saved)
    prefix, outer = {
        "alone": ("", module),
        "inside": ("loss.", nn.ModuleDict({"loss": module, "model": nn.Linear(2, 2)})),
        "wrapper": ("main_loss.", wrapped(module, 9)),
    }[where]
    others = {k: x for k, x in contents(outer).items() if not k.startswith(prefix)}
    if where == "wrapper":
        others = {"_progress": contents(wrapped(used(make), 11))["_progress"]}
    before = contents(outer)
    given = {**{prefix + k: x for k, x in saved.items()}, **others}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"(?s)nothing was loaded.*{says}"):
            outer.load_state_dict(given, strict=strict)
        assert equal(contents(outer), before)
        assert module.temperature == before[prefix + "_tau"]


@every_loss
@pytest.mark.parametrize("more", [{"queue_size": 5}, {"queue_size": 7}, {"num_classes": 2}])
def test_another_size_says_both(make, more):
    module, other = used(make), used(make, 1, **more)
    before = contents(module)
    with pytest.raises(RuntimeError, match=r"queue_size=\d and num_classes=\d.*queue_size=6"):
        module.load_state_dict(other.state_dict())
    assert equal(contents(module), before)


@every_loss
def test_a_misfit_does_not_bring_labels_or_ids(make):
    module, saved = used(make, query_ids=False), contents(used(make, 1))
    saved = {k: x for k, x in saved.items() if k not in NEW}  # as 0.4 saved it
    saved["_queue._q_targets"] = torch.ones(6, 3, dtype=torch.bool)
    module_before = contents(module)
    with pytest.raises(RuntimeError, match="_q_weight"):
        module.load_state_dict({**saved, "_queue._q_weight": torch.ones(2)})
    assert equal(contents(module), module_before)
    module.load_state_dict(saved)  # both fit
    assert module._queue.state.targets.all()
    assert torch.equal(module._queue.state.query_ids, saved["_queue._q_query_ids"])


@every_loss
def test_a_checkpoint_without_a_queue_leaves_the_queue_alone(make):
    module, before = used(make), contents(used(make))
    with pytest.raises(RuntimeError, match=r"Missing key.*_queue\._q_logits"):
        module.load_state_dict(make(num_classes=3, queue_size=0).state_dict())
    module = used(make)
    module.load_state_dict(make(num_classes=3, queue_size=0).state_dict(), strict=False)
    queue = {k: x for k, x in before.items() if k.startswith("_queue")}
    assert equal({k: x for k, x in contents(module).items() if k in queue}, queue)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_queue\._q_"):
        make(num_classes=3, queue_size=0).load_state_dict(before)


STATE = {
    "clock": "step", "epoch": 3, "global_step": 9, "switch_step": 6, "batch_hook_seen": True,
    "temperature": 0.2,
}  # fmt: skip
BAD_STATE = [
    ([], "must be a dict, got list"),
    (None, "must be a dict, got NoneType"),
    ({**STATE, "clock": "epoch"}, "counted in epochs and this wrapper's is in steps"),
    ({**STATE, "clock": 3}, "clock|counted in"),
    ({**STATE, "epoch": 1.5}, "epoch must be an integer, got float"),
    ({**STATE, "epoch": None}, "epoch must be an integer"),
    ({**STATE, "global_step": "9"}, "global_step must be an integer, got str"),
    ({**STATE, "global_step": 2**70}, "global_step must fit"),
    ({**STATE, "switch_step": -2}, "switch_step must be >= -1"),
    ({**STATE, "switch_step": True}, "switch_step must be an integer"),
    ({**STATE, "batch_hook_seen": 1}, "batch_hook_seen must be a bool"),
    ({**STATE, "temperature": 0.0}, "temperature must be positive"),
    ({**STATE, "temperature": "hot"}, "temperature must be a number"),
]


@pytest.mark.parametrize(("state", "says"), BAD_STATE)
def test_a_broken_schedule_changes_nothing(state, says):
    wrapper, other = wrapped(used(smooth), 7), wrapped(used(smooth, 1), 9)
    before = contents(wrapper)
    weight, temperature = wrapper.main_weight, wrapper.current_temperature
    for outer, prefix in ((wrapper, ""), (nn.ModuleDict({"loss": wrapper}), "loss.")):
        saved = {prefix + k: x for k, x in contents(other).items() if k != "_progress"}
        with pytest.raises(RuntimeError, match=f"(?s)nothing was loaded.*{says}"):
            outer.load_state_dict({**saved, prefix + "_extra_state": state})
    assert equal(contents(wrapper), before)
    assert (wrapper.main_weight, wrapper.current_temperature) == (weight, temperature)


@pytest.mark.parametrize(
    ("progress", "says"),
    [
        ({"step": 3}, "_progress must be a tensor, got dict"),
        (torch.zeros(5, dtype=torch.int64), r"_progress must be \[6\] int64, got \[5\]"),
        (torch.zeros(6), r"got \[6\] torch.float32"),
    ],
)
def test_a_schedule_that_is_none_changes_nothing(progress, says):
    wrapper, other = wrapped(used(smooth), 7), wrapped(used(smooth, 1), 9)
    before = contents(wrapper)
    with pytest.raises(RuntimeError, match=f"(?s)nothing was loaded.*{says}"):
        wrapper.load_state_dict({**contents(other), "_progress": progress})
    assert equal(contents(wrapper), before)


@pytest.mark.parametrize(("mine", "theirs"), [(STEPS, EPOCHS), (EPOCHS, STEPS)])
def test_a_schedule_on_another_clock_is_refused(mine, theirs):
    wrapper, other = wrapped(used(smooth), **mine), wrapped(used(smooth, 1), **theirs)
    before = contents(wrapper)
    with pytest.raises(RuntimeError, match="warmup counted in"):
        wrapper.load_state_dict(other.state_dict())
    assert equal(contents(wrapper), before)


def test_what_a_schedule_lacks_stays_as_it_is():
    wrapper = wrapped(used(smooth), 7)
    before = {k: x for k, x in contents(wrapper).items() if k != "_progress"}
    wrapper.load_state_dict({**before, "_extra_state": {"global_step": 8}})
    assert contents(wrapper)["_progress"].tolist()[:3] == [2, 8, 7]
    assert wrapper.main_weight == pytest.approx(3 / 6)  # the third of five blend steps
    before = contents(wrapper)
    wrapper.load_state_dict({k: x for k, x in before.items() if k != "_progress"})
    assert equal(contents(wrapper), before)


@pytest.mark.parametrize("mode", [EPOCHS, STEPS])
def test_a_bad_step_changes_nothing(mode):
    wrapper = wrapped(used(smooth), **mode)
    before = contents(wrapper)
    for bad in (1.5, "3", None, True, 2**70, torch.tensor([1, 2]), torch.tensor(1.5)):
        for hook in (wrapper.on_train_batch_start, wrapper.on_train_epoch_start):
            name = "epoch" if "epoch" in hook.__name__ else "step"
            with pytest.raises((TypeError, ValueError), match=f"{name} must"):
                hook(bad)
    assert equal(contents(wrapper), before)
    wrapper.on_train_epoch_start(torch.tensor([1]))
    wrapper.on_train_batch_start(torch.tensor([7]))
    assert contents(wrapper)["_progress"][1] == 7


# -- copies


@every_loss
@pytest.mark.parametrize("through", ["deepcopy", "pickle", "wrapper"])
def test_a_copy_decides_anew_whether_to_gather(make, through, monkeypatch):
    module, gathered = used(make), []
    twin = {
        "deepcopy": lambda: copy.deepcopy(module),
        "pickle": lambda: pickle.loads(pickle.dumps(module)),
        "wrapper": lambda: copy.deepcopy(wrapped(module)).main_loss,
    }[through]()
    assert equal(contents(twin), contents(module))
    # A process group comes up: what was decided before stands, what was copied is new to it.
    monkeypatch.setattr(_batch, "world_size", lambda: 2)
    monkeypatch.setattr(_batch, "all_gather_with_grad", lambda *rows: gathered.append(rows) or rows)
    module(*batch(5, classes=3))
    assert not gathered
    twin(*batch(5, classes=3))
    assert len(gathered) == 1
