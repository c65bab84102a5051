"""The warmup wrapper, and what modules keep: checkpoints, copies, compiled steps."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import proxy_losses as P

from .compiling import compile_fresh
from .test_modules import PAD, batch, both, smooth, warned
from .test_schedule import RTOL, reference_temp, reference_weight


class Main:
    """A main loss that writes down what is done to it."""

    def __init__(self):
        self.temperature, self.gather_distributed = 0.5, "as it was"
        self.calls, self.resets = [], 0

    def reset_queue(self):
        self.resets += 1

    def __call__(self, logits, targets, **kwargs):
        self.calls.append(kwargs)
        return 3.0 * logits.sum(), "per class"


def warm(logits, targets):
    return logits.mean(), "ignored"


def wrap(main, **kwargs):
    return P.LossWarmupWrapper(warm, main, **kwargs)


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


def test_arguments_are_readable():
    for mode in ({"warmup_epochs": 2, "blend_epochs": 3}, {"warmup_steps": 2, "blend_steps": 3}):
        given = {
            "warmup_loss": warm, "main_loss": Main(), "temp_start": 0.2, "temp_end": 0.1,
            "temp_decay_steps": 9, "final_main_weight": 0.5, "reset_queue_each_epoch": True,
            "gather_distributed": False, **mode,
        }  # fmt: skip
        wrapper = P.LossWarmupWrapper(**given)
        assert {name: getattr(wrapper, name) for name in given} == given
    assert set(given) | {"warmup_epochs", "blend_epochs"} == set(
        inspect.signature(P.LossWarmupWrapper).parameters
    )


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
    assert warned(lambda: wired(x, y)) == []
    (text,) = warned(lambda: [wired(x, y, sample_weight=zeros) for _ in range(3)])
    assert "sample_weight is entirely zero" in text  # a call deeper, still the caller's line


PER_EPOCH = 3
MODES = {
    "epochs": {"warmup_epochs": 3, "blend_epochs": 2},
    "steps": {"warmup_steps": 4, "blend_steps": 5},
    "no warmup": {"blend_epochs": 2},
    "no blend": {"warmup_steps": 5},
}
TEMPS = {"decays": (0.1, 0.01), "grows": (0.01, 0.1), "stays": (0.05, 0.05)}


@pytest.mark.parametrize("temps", TEMPS.values(), ids=TEMPS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_phases_temperature_and_the_one_reset(mode, temps):
    main, ramp = Main(), {"temp_start": temps[0], "temp_end": temps[1], "temp_decay_steps": 7}
    wrapper = wrap(main, final_main_weight=0.8, **ramp, **mode)
    warmup = mode.get("warmup_steps", mode.get("warmup_epochs", 0))
    sched = P.Schedule(warmup, mode.get("blend_steps", mode.get("blend_epochs", 0)), **ramp)
    sched = sched._replace(final_main_weight=0.8)
    switch = warmup if "warmup_steps" in mode else warmup * PER_EPOCH
    assert main.temperature == (0.5 if warmup else temps[0])
    for step in range(30):
        now = step if "warmup_steps" in mode else step // PER_EPOCH
        if step % PER_EPOCH == 0:
            wrapper.on_train_epoch_start(step // PER_EPOCH)
            assert main.resets == (step > switch > 0)  # the epoch hook resets nothing
        wrapper.on_train_batch_start(step)
        assert main.resets == (step >= switch > 0)
        assert wrapper.in_warmup == (now < warmup)
        assert wrapper.in_blend == (0 <= now - warmup < sched.blend_steps)
        assert wrapper.main_weight == wrapper.ap_weight == reference_weight(now, sched)
        since_switch = reference_temp(step, sched._replace(warmup_steps=switch))
        want = since_switch if step >= switch else 0.5  # untouched in warmup
        assert wrapper.current_temperature == main.temperature == pytest.approx(want, rel=RTOL)
    assert main.temperature == temps[1]


@pytest.mark.parametrize(
    ("kwargs", "table"),
    [
        ({"warmup_epochs": 5, "blend_epochs": 2}, {0: 0, 4: 0, 5: 1 / 3, 6: 2 / 3, 7: 1, 9: 1}),
        ({"warmup_steps": 500, "blend_steps": 3}, {499: 0, 500: 0.25, 501: 0.5, 502: 0.75, 503: 1}),
        (
            {"warmup_epochs": 5, "blend_epochs": 2, "final_main_weight": 0.75},
            {4: 0, 5: 0.25, 6: 0.5, 7: 0.75, 8: 0.75},
        ),
    ],
)
def test_tables(kwargs, table):
    wrapper = wrap(Main(), **kwargs)
    hook = wrapper.on_train_epoch_start
    hook = wrapper.on_train_batch_start if "warmup_steps" in kwargs else hook
    for now, weight in table.items():
        hook(now)
        assert wrapper.main_weight == pytest.approx(weight, rel=RTOL, abs=0)


def test_what_reaches_the_losses_in_each_phase():
    x, y, w = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.zeros(2), torch.ones(2)
    main, seen = Main(), []

    def declares(logits, targets, sample_weight=None):
        seen.append(sample_weight)
        return logits.mean()

    for warmup_loss in (warm, declares):
        wrapper = P.LossWarmupWrapper(warmup_loss, main, warmup_steps=1, blend_steps=2)
        for step, weight in enumerate([0.0, 1 / 3, 2 / 3, 1.0]):
            main.calls.clear(), seen.clear()
            wrapper.on_train_batch_start(step)
            out = wrapper(x, y, sample_weight=w, return_per_class=True)
            if weight == 1.0:  # all that main_loss returns, with all that it takes
                assert out == (9.0, "per class")
                assert main.calls == [{"sample_weight": w, "return_per_class": True}]
                continue
            # In float64: 1.5 in warmup, 9 in the main phase.
            assert out.item() == pytest.approx((1 - weight) * 1.5 + weight * 9.0, rel=RTOL)
            assert main.calls == ([{"sample_weight": w}] if weight else [])
            assert len(seen) == (warmup_loss is declares)
            assert all(s is w for s in seen)
    partial = wrap(main, final_main_weight=0.5)
    partial.on_train_batch_start(0)
    assert partial(x, y, return_per_class=True).item() == (1.5 + 9.0) / 2
    assert main.calls[-1] == {}


@pytest.mark.parametrize("value", [None, True, False])
def test_gather_distributed_is_overwritten_only_when_given(value):
    main = Main()
    wrap(main, gather_distributed=value)
    assert main.gather_distributed == ("as it was" if value is None else value)
    bare = smooth()
    del bare.gather_distributed
    wrap(bare, gather_distributed=value)
    assert not hasattr(bare, "gather_distributed")


@pytest.mark.parametrize("mode", [{"warmup_epochs": 2}, {"warmup_steps": 6}, {}])
def test_the_queue_is_reset_at_each_epoch_of_the_main_phase(mode):
    main = Main()
    wrapper, resets = wrap(main, reset_queue_each_epoch=True, **mode), []
    for step in range(15):
        if step % PER_EPOCH == 0:
            wrapper.on_train_epoch_start(step // PER_EPOCH)
        wrapper.on_train_batch_start(step)
        resets.append(main.resets)
    grows = [b > a for a, b in zip([0, *resets], resets, strict=False)]
    first = 6 if mode else 0
    assert [k for k, g in enumerate(grows) if g] == list(range(first, 15, PER_EPOCH))


def new_run(loss: str, seed: int, **mode):
    torch.manual_seed(seed)
    model, options = nn.Linear(4, 3), {"queue_size": 10, "temperature": 0.7, "max_pool_size": 12}
    main = {"ap": P.SmoothAPLoss, "recall": P.RecallAtQuantileLoss}[loss](3, **options)
    wrapper = P.LossWarmupWrapper(
        nn.CrossEntropyLoss(), main, temp_start=0.5, temp_end=0.05, temp_decay_steps=9, **mode
    )
    return model, torch.optim.Adam(model.parameters(), lr=0.05), wrapper


def train(run, steps):
    model, optimizer, wrapper = run
    losses = []
    for step in steps:
        if step % 4 == 0:
            wrapper.on_train_epoch_start(step // 4)
        wrapper.on_train_batch_start(step)
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(5, 4, generator=g), torch.randint(3, (5,), generator=g)
        loss = wrapper(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), wrapper.main_weight, wrapper.current_temperature))
    return losses


@pytest.mark.filterwarnings("ignore:.*max_pool_size")
@pytest.mark.parametrize("loss", ["ap", "recall"])
@pytest.mark.parametrize(
    "mode",
    [
        {"warmup_epochs": 2, "blend_epochs": 2, "final_main_weight": 0.75},
        {"warmup_steps": 8, "blend_steps": 6},
        {},
    ],
)
def test_resumes_bit_for_bit(loss, mode):
    whole = new_run(loss, 0, **mode)
    losses = train(whole, range(24))
    # Mid-warmup, before and after the switch, mid-blend, mid-decay, and after it.
    for stop in (3, 8, 9, 10, 16, 20):
        run, resumed, file = new_run(loss, 0, **mode), new_run(loss, 1, **mode), io.BytesIO()
        train(run, range(stop))
        torch.save([part.state_dict() for part in run], file)
        file.seek(0)
        for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        for continued in (resumed, copy.deepcopy(run)):
            assert train(continued, range(stop, 24)) == losses[stop:]
            if continued is resumed:
                pairs = zip(resumed[0].parameters(), whole[0].parameters(), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)


ROWS, IDS = torch.tensor([[0.3], [-0.2], [0.9], [0.1]]), torch.tensor([1, 0, PAD, 1])
EXTRAS = {"_q_iid": torch.tensor([True, False, True, True]), "_q_weight": torch.rand(4) + 0.5}
SCHEDULE = {
    "epoch": 2, "global_step": 9, "switch_step": -1, "batch_hook_seen": False, "temperature": 0.3
}  # fmt: skip


@both
@pytest.mark.parametrize("extras", [{}, EXTRAS, "flat"], ids=["nested", "with flags", "flat"])
@pytest.mark.parametrize("filled", [2, 4])
@pytest.mark.parametrize("options", [{}, {"max_pool_size": 50}])
@pytest.mark.parametrize("wrapped", [False, True, SCHEDULE], ids=["bare", "wrapped", "scheduled"])
def test_checkpoints_of_the_published_packages_load(make, extras, filled, options, wrapped):
    module, twin = (make(queue_size=4, **options) for _ in "ab")
    # Slots 2 and 3 hold the older rows, or none yet.
    targets = torch.where(torch.arange(4) < filled, IDS, PAD)
    rows = {"_q_logits": ROWS, "_q_targets": targets, "_q_ptr": torch.tensor([2])}
    flat = extras == "flat"
    rows = rows if flat else {**rows, **extras}
    prefix = ("main_loss." if wrapped else "") + ("" if flat else "_queue.")
    saved = {prefix + name: t.clone() for name, t in rows.items()}
    if wrapped == SCHEDULE:
        saved["_extra_state"] = dict(SCHEDULE)
    names = list(saved)
    outer = wrap(module, warmup_epochs=2) if wrapped else module
    outer.load_state_dict(saved, strict=True)
    assert list(saved) == names, "the caller's dictionary was changed"
    if wrapped == SCHEDULE:
        assert module.temperature == 0.3
        outer.on_train_batch_start(9)  # the switch was still to come
        assert module._queue.state.enqueued == 0
        assert module.temperature == 0.05
        return

    # The same rows through the front door, in the same slots.
    weight = EXTRAS["_q_weight"] if extras is EXTRAS else torch.ones(4)
    order = [0, 1] if filled == 2 else [0, 1, 2, 3, 0, 1]
    for k in ([0, 1],) if filled == 2 else ([0, 1], [2, 3], [0, 1]):
        twin._queue.store(P.enqueue(twin._queue.state, ROWS[k], IDS[k], sample_weight=weight[k]))
    assert len(order) == int(twin._queue.state.enqueued)
    for seed in range(6):
        x, y = batch(seed, 3)
        assert torch.equal(module(x, y), twin(x, y))


def test_a_checkpoint_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        smooth(queue_size=4).load_state_dict(smooth(queue_size=5).state_dict())


@both
def test_copies_are_independent(make):
    module = make()
    module(*batch(0))
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        before = [t.clone() for t in module.state_dict().values()]
        again = copy.deepcopy(module)
        for seed in range(1, 4):
            assert torch.equal(clone(*batch(seed)), again(*batch(seed)))
        clone.temperature = 9.0
        assert all(map(torch.equal, before, module.state_dict().values()))
        assert (module.temperature, module._tau.item()) == (0.25, 0.25)


@both
def test_a_compiled_module_follows_its_temperature(make):
    torch.compiler.reset()
    module, eager, counter, counts = make(), make(), CompileCounter(), []
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for step in range(12):
        module.temperature = eager.temperature = 0.5 / (1 + step)
        (a, targets), (b, _) = batch(step), batch(step)
        got, want = compiled(a, targets), eager(b, targets)
        (got + want).backward()
        assert all(map(torch.equal, (got, a.grad), (want, b.grad)))
        assert all(map(torch.equal, module._queue.state, eager._queue.state))
        counts.append(counter.frame_count)
    assert counts[1] <= 2
    assert counts[-1] == counts[1]


def test_the_default_compiler_agrees():
    module, eager = smooth(num_classes=3), smooth(num_classes=3)
    compiled, compiles = compile_fresh(module)
    for step in range(4):
        module.temperature = eager.temperature = 0.5 / (1 + step)
        (a, targets), (b, _) = batch(step, classes=3), batch(step, classes=3)
        got, want = compiled(a, targets), eager(b, targets)
        (got + want).backward()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(a.grad, b.grad)
    assert compiles() <= 2


def test_a_compiled_wrapper_goes_through_its_phases():
    torch.compiler.reset()
    counter, mode = CompileCounter(), {"warmup_steps": 3, "blend_steps": 6, "temp_decay_steps": 9}
    wrapper, eager = (P.LossWarmupWrapper(nn.CrossEntropyLoss(), smooth(num_classes=3), **mode)
                      for _ in "ab")  # fmt: skip
    compiled = torch.compile(wrapper, fullgraph=True, backend=counter)
    for step in range(20):
        for w in (wrapper, eager):
            w.on_train_batch_start(step)
        logits, targets = batch(step, classes=3)
        assert torch.equal(compiled(logits, targets), eager(logits, targets))
    # Warmup, the first blend step, every other blend step, the main phase.
    assert counter.frame_count <= 4
