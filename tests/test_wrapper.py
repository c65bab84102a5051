"""The warmup wrapper, and what modules keep: checkpoints and copies."""

import copy
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import proxy_losses as P

from .makers import PAD, batch, every_loss, smooth, warned
from .test_schedule import RTOL, reference_temp, reference_weight

pytestmark = [  # a class of a small pool may have a single iid negative
    pytest.mark.filterwarnings(f"ignore:.*{text}") for text in ("max_pool_size", "dispersion")
]
MODES = [("epochs", 3, 2), ("steps", 4, 5), ("steps", 5, 0), ("epochs", 0, 2)]
EPOCHS = {"warmup_epochs": 2, "blend_epochs": 2, "final_main_weight": 0.75}
STEPS = {"warmup_steps": 6, "blend_steps": 5}


class Main:  # a main loss that writes down what is done to it
    def __init__(self):
        self.temperature, self.gather_distributed, self.calls = 0.5, "as it was", []
        self.resets = 0

    def reset_queue(self):
        self.resets += 1

    def __call__(self, logits, targets, **kwargs):
        self.calls.append(kwargs)
        return 3.0 * logits.sum(), "per class"


def warm(logits, targets):
    return logits.mean(), "ignored"


def wrap(main, **kwargs):
    return P.LossWarmupWrapper(warm, main, **kwargs)


def drive(wrapper, steps):
    """The hooks of a training loop with three steps in an epoch."""
    for step in steps:
        if step % 3 == 0:
            wrapper.on_train_epoch_start(step // 3)
        wrapper.on_train_batch_start(step)
        yield step


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        *(({name: -1}, name) for name in ("warmup_epochs", "blend_epochs", "warmup_steps")),
        ({"warmup_steps": 1, "blend_steps": -1}, "blend_steps"),
        *(({"temp_decay_steps": n}, "temp_decay_steps") for n in (0, -5)),
        *(({name: x}, f"{name}.*positive") for name in ("temp_start", "temp_end") for x in (0, -1)),
        *(({"final_main_weight": x}, "final_main_weight") for x in (0.0, -0.5, 1.01)),
        ({"warmup_epochs": 1, "warmup_steps": 1}, "(?s)warmup_epochs.*warmup_steps"),
        ({"warmup_steps": 1, "blend_epochs": 1, "blend_steps": 1}, "blend_epochs.*blend_steps"),
        ({"blend_steps": 2}, "blend_steps requires warmup_steps"),
        ({"warmup_epochs": 1, "blend_steps": 2}, "blend_steps requires warmup_steps"),
    ],
)
def test_a_bad_argument_is_named(kwargs, says):
    with pytest.raises(ValueError, match=says):
        wrap(Main(), **kwargs)


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_arguments_are_readable(unit):
    given = {
        "warmup_loss": warm, "main_loss": Main(), "temp_start": 0.2, "temp_end": 0.1,
        "temp_decay_steps": 9, "final_main_weight": 0.5, "reset_queue_each_epoch": True,
        "gather_distributed": False, f"warmup_{unit}": 2, f"blend_{unit}": 3,
    }  # fmt: skip
    wrapper = P.LossWarmupWrapper(**given)
    assert {name: getattr(wrapper, name) for name in given} == given


@pytest.mark.parametrize("unit", ["epochs", "steps"])
@pytest.mark.parametrize("number", [float, np.float32, torch.tensor])
def test_whole_numbers_of_any_kind_count(unit, number):
    mode = {f"warmup_{unit}": 2, f"blend_{unit}": 3, "temp_decay_steps": 4}
    plain = wrap(Main(), **mode)
    other = wrap(Main(), **{name: number(n) for name, n in mode.items()})
    for k in range(12):
        for wrapper, step in (plain, k), (other, number(k)):
            wrapper.on_train_epoch_start(step)
            wrapper.on_train_batch_start(step)
        assert other.main_weight == plain.main_weight
        assert other.current_temperature == plain.current_temperature
    assert all(map(torch.equal, plain.state_dict().values(), other.state_dict().values()))
    with pytest.raises(TypeError, match="global_step must be an integer"):
        other.on_train_batch_start(number(12.5))
    for name in mode:
        with pytest.raises(TypeError, match=f"{name} must be an integer"):
            wrap(Main(), **{**mode, name: number(2.5)})


def test_warnings():
    def plain(logits, targets):
        return logits.sum()

    (text,) = warned(lambda: wrap(plain))
    assert "temperature" in text
    texts = warned(lambda: wrap(plain, reset_queue_each_epoch=True))
    assert ["reset_queue" in t for t in texts] == [False, True]
    x, y = batch(0)
    undriven = wrap(smooth(), warmup_epochs=1)
    assert warned(lambda: undriven(x, y)) == []  # warmup needs no batch hook
    undriven.on_train_epoch_start(1)
    (text,) = warned(lambda: [undriven(x, y) for _ in range(3)])
    assert "on_train_batch_start" in text
    wired, zeros = wrap(smooth(), reset_queue_each_epoch=True), torch.zeros(5)
    wired.on_train_batch_start(0)
    resumed = wrap(smooth())
    resumed.load_state_dict(wired.state_dict())
    assert warned(lambda: [wired(x, y), resumed(x, y)]) == []
    (text,) = warned(lambda: [wired(x, y, sample_weight=zeros) for _ in range(3)])
    assert "sample_weight is entirely zero" in text  # a call deeper, still the caller's line


@pytest.mark.parametrize("temps", [(0.1, 0.01), (0.01, 0.1), (0.05, 0.05)])
@pytest.mark.parametrize(("unit", "warmup", "blend"), MODES)
def test_phases_temperature_and_the_one_reset(unit, warmup, blend, temps):
    main, sched = Main(), P.Schedule(warmup, blend, *temps, 7, 0.8)
    mode = {f"warmup_{unit}": warmup, f"blend_{unit}": blend, "final_main_weight": 0.8}
    wrapper = wrap(main, temp_start=temps[0], temp_end=temps[1], temp_decay_steps=7, **mode)
    switch = sched._replace(warmup_steps=warmup * (3 if unit == "epochs" else 1))
    assert main.temperature == (0.5 if warmup else temps[0])
    for step in drive(wrapper, range(30)):
        now, started = step // 3 if unit == "epochs" else step, step >= switch.warmup_steps
        assert main.resets == (started and warmup > 0)
        assert wrapper.in_warmup == (now < warmup)
        assert wrapper.in_blend == (0 <= now - warmup < blend)
        assert wrapper.main_weight == wrapper.ap_weight == reference_weight(now, sched)
        want = reference_temp(step, switch) if started else 0.5  # untouched in warmup
        assert wrapper.current_temperature == main.temperature == pytest.approx(want, rel=RTOL)


@pytest.mark.parametrize(
    ("unit", "options", "table"),
    [
        ("epoch", (5, 2, 1.0), {0: 0, 4: 0, 5: 1 / 3, 6: 2 / 3, 7: 1, 9: 1}),
        ("step", (500, 3, 1.0), {0: 0, 499: 0, 500: 0.25, 501: 0.5, 502: 0.75, 503: 1, 999: 1}),
        ("epoch", (5, 2, 0.75), {4: 0, 5: 0.25, 6: 0.5, 7: 0.75, 8: 0.75}),
    ],
)
def test_tables(unit, options, table):
    names = (f"warmup_{unit}s", f"blend_{unit}s", "final_main_weight")
    wrapper = wrap(Main(), **dict(zip(names, options, strict=True)))
    for now, weight in table.items():
        wrapper.on_train_epoch_start(now) if unit == "epoch" else wrapper.on_train_batch_start(now)
        assert wrapper.main_weight == pytest.approx(weight, rel=RTOL, abs=0)


def test_what_reaches_the_losses_in_each_phase():
    x, y, w = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.zeros(2), torch.ones(2)
    g, main, seen = torch.zeros(2), Main(), []

    def declares(logits, targets, sample_weight=None):
        seen.append(sample_weight)
        return logits.mean()

    for warmup_loss, named in (
        (warm, {"sample_weight": w}),
        (declares, {"sample_weight": w}),
        (declares, {"sample_weight": w, "query_ids": g}),
        (warm, {"query_ids": g}),
        (warm, {}),
    ):
        wrapper = P.LossWarmupWrapper(warmup_loss, main, warmup_steps=1, blend_steps=2)
        for step, weight in enumerate([0.0, 1 / 3, 2 / 3, 1.0]):
            main.calls.clear(), seen.clear()
            wrapper.on_train_batch_start(step)
            out = wrapper(x, y, **named, return_per_class=True)
            if weight == 1.0:  # all that main_loss returns, with all that it takes
                assert out == (9.0, "per class")
                assert main.calls == [{**named, "return_per_class": True}]
                continue
            # In float64: 1.5 in warmup, 9 in the main phase.
            assert out.item() == pytest.approx((1 - weight) * 1.5 + weight * 9.0, rel=RTOL)
            assert main.calls == ([named] if weight else [])
            assert seen == [w] * (warmup_loss is declares)
    partial = wrap(main, final_main_weight=0.5)
    partial.on_train_batch_start(0)
    assert partial(x, y, return_per_class=True).item() == (1.5 + 9.0) / 2
    assert main.calls[-1] == {}


@pytest.mark.parametrize("value", [None, True, False])
def test_gather_distributed_is_overwritten_only_when_given(value):
    main, bare = Main(), Main()
    del bare.gather_distributed
    for m in (main, bare):
        wrap(m, gather_distributed=value)
    assert main.gather_distributed == ("as it was" if value is None else value)
    assert not hasattr(bare, "gather_distributed")


@pytest.mark.parametrize("mode", [{"warmup_epochs": 2}, {"warmup_steps": 6}, {}])
def test_the_queue_is_reset_at_each_epoch_of_the_main_phase(mode):
    main, resets = Main(), {}
    for step in drive(wrap(main, reset_queue_each_epoch=True, **mode), range(15)):
        resets.setdefault(main.resets, step)
    first = [0, 6] if mode else [0]  # nothing is reset before the main phase
    assert list(resets.values()) == [*first, *range(first[-1] + 3, 15, 3)]


def new_run(loss, seed: int, **mode):
    torch.manual_seed(seed)
    model, main = nn.Linear(4, 3), loss(3, queue_size=10, temperature=0.7, max_pool_size=12)
    ramp = {"temp_start": 0.5, "temp_end": 0.05, "temp_decay_steps": 9}
    wrapper = P.LossWarmupWrapper(nn.CrossEntropyLoss(), main, **ramp, **mode)
    return model, torch.optim.Adam(model.parameters(), lr=0.05), wrapper


def train(run, steps):
    (model, optimizer, wrapper), losses = run, []
    for step in drive(wrapper, steps):
        torch.manual_seed(step)
        loss = wrapper(model(torch.randn(5, 4)), torch.randint(3, (5,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), wrapper.main_weight, wrapper.current_temperature))
    return losses


@pytest.mark.parametrize(
    ("loss", "mode"),
    [
        *((P.SmoothAPLoss, mode) for mode in (EPOCHS, STEPS, {})),
        (P.RecallAtQuantileLoss, STEPS), (P.PAUCAtBudgetLoss, EPOCHS),
    ],
)  # fmt: skip
def test_resumes_bit_for_bit(loss, mode, tmp_path):
    whole = new_run(loss, 0, **mode)
    losses = train(whole, range(22))
    # Mid-warmup, before the switch and after, mid-blend, mid-decay, and at temp_end.
    for stop in (2, 6, 7, 9, 13, 18):
        run, resumed, file = new_run(loss, 0, **mode), new_run(loss, 1, **mode), tmp_path / "run"
        train(run, range(stop))
        torch.save([part.state_dict() for part in run], file)
        for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        for name in ("main_weight", "in_warmup", "in_blend", "current_temperature"):
            assert getattr(resumed[2], name) == getattr(run[2], name)
        copies = [copy.deepcopy(run), pickle.loads(pickle.dumps(run))] if stop == 9 else []
        for going in (resumed, *copies, run):  # each goes its own way
            assert train(going, range(stop, 22)) == losses[stop:]
            assert all(map(torch.equal, going[0].parameters(), whole[0].parameters()))


ROWS, IDS = torch.tensor([[0.3], [-0.2], [0.9], [0.1]]), torch.tensor([1, 0, PAD, 1])
FLAGS = {"_q_iid": torch.tensor([True, False, True, True]), "_q_weight": torch.arange(1.0, 5.0)}


def published(room="_queue.", targets=IDS, **more):
    rows = {"_q_logits": ROWS, "_q_targets": targets, "_q_ptr": torch.tensor([2]), **more}
    return {room + name: t for name, t in rows.items()}


@every_loss
@pytest.mark.parametrize("outer", ["", "main_loss."])
@pytest.mark.parametrize(("room", "more"), [("", {}), ("_queue.", {}), ("_queue.", FLAGS)])
@pytest.mark.parametrize("filled", [2, 4])
def test_checkpoints_of_the_published_packages_load(make, outer, room, more, filled):
    module, twin = make(queue_size=4), make(queue_size=4)
    # Slots 2 and 3 hold the older rows, or none yet.
    saved = published(outer + room, torch.where(torch.arange(4) < filled, IDS, PAD), **more)
    names = list(saved)
    (wrap(module, warmup_epochs=1) if outer else module).load_state_dict(saved, strict=True)
    assert list(saved) == names, "the caller's dictionary was changed"
    # The same rows through the front door, into the same slots.
    flags = FLAGS if more else {name: torch.ones_like(t) for name, t in FLAGS.items()}
    for k in [[0, 1]] if filled == 2 else [[0, 1], [2, 3], [0, 1]]:
        twin(ROWS[k], IDS[k], flags["_q_iid"][k], sample_weight=flags["_q_weight"][k])
    assert torch.equal(module._queue.state.iid_mask, twin._queue.state.iid_mask)
    for seed in range(6):
        assert torch.equal(module(*batch(seed, 3)), twin(*batch(seed, 3)))


def test_a_published_schedule_loads_into_any_options():
    main = smooth(queue_size=4, max_pool_size=50)
    main.load_state_dict(published(), strict=True)
    wrapper, schedule = wrap(main, warmup_epochs=2), {"epoch": 2, "global_step": 9}
    schedule.update(switch_step=-1, batch_hook_seen=False, temperature=0.3)
    saved = {k: x for k, x in wrapper.state_dict().items() if k != "_progress"}
    wrapper.load_state_dict({**saved, "_extra_state": schedule})
    assert (wrapper.main_weight, main.temperature) == (1.0, 0.3)
    assert P.queue_rows(main._queue.state)[2].tolist() == [True, True, False, True]
    wrapper.on_train_batch_start(10)  # the switch was still to come
    assert main.temperature == 0.05
    assert not P.queue_rows(main._queue.state)[2].any()


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_strict_raises_until_the_schedule_is_driven(unit):
    x, y = batch(0)
    wrapper = wrap(smooth(), **{f"warmup_{unit}": 1}, strict=True)
    needed = {"epochs": "on_train_epoch_start.* and on_train_batch_start", "steps": "on_train_b"}
    with pytest.raises(RuntimeError, match=f"not driven: {needed[unit]}"):
        wrapper(x, y)
    wrapper.eval()(x, y)  # a validation before training is no mistake
    wrapper.train().on_train_batch_start(0)
    if unit == "epochs":
        with pytest.raises(RuntimeError, match=r"not driven: on_train_epoch_start.epoch. was"):
            wrapper(x, y)
        wrapper.on_train_epoch_start(0)
    wrapper(x, y)
    resumed = wrap(smooth(), **{f"warmup_{unit}": 1}, strict=True)
    resumed.load_state_dict(wrapper.state_dict())
    assert resumed(x, y) == wrapper(x, y)


def test_a_mock_is_a_loss():
    """It has every attribute that it is asked for, so none may be followed."""
    warmup = mock.MagicMock(return_value=torch.ones(()))
    wrapper = P.LossWarmupWrapper(warmup, P.SmoothAPLoss(1), warmup_steps=1)
    wrapper.on_train_batch_start(0)
    assert wrapper(torch.zeros(2, 1), torch.tensor([0, 1])) == 1.0
    warmup.assert_called_once()


def test_the_published_extra_state_is_told_and_not_saved():
    wrapper = P.LossWarmupWrapper(nn.CrossEntropyLoss(), smooth(num_classes=3), warmup_epochs=1)
    wrapper.on_train_epoch_start(2)
    wrapper.on_train_batch_start(7)
    want = {
        "clock": "epoch", "epoch": 2, "global_step": 7, "switch_step": 7, "batch_hook_seen": True,
        "temperature": wrapper.current_temperature,
    }  # fmt: skip
    for each in (wrapper, copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert each.get_extra_state() == want
        assert each.get_extra_state.__self__ is each
        assert not [key for key in each.state_dict() if key.endswith("_extra_state")]
