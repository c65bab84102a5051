"""Schedules as functions of a step, and the state of the two clocks, each against plain Python."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import proxy_losses as P
from proxy_losses import Schedule, ScheduleState, blend_weight, in_blend, in_warmup, temp_at

from .compiling import compile_fresh

VALUES = (temp_at, blend_weight, in_warmup, in_blend)
DTYPES = {int: torch.int64, float: torch.float64}
EPS = 2.0**-52
# A quotient, a power and a product in float64, each good to one unit in the last place, here and
# in Python's math: at most 3 EPS on each side.
RTOL = 6 * EPS

STEPS = st.one_of(st.integers(0, 200), st.integers(0, 2**40))
TEMPS = st.floats(1e-6, 1e3)
SCHEDULES = st.builds(
    Schedule,
    warmup_steps=st.one_of(st.integers(0, 60), st.integers(0, 2**33)),
    blend_steps=st.one_of(st.integers(0, 60), st.integers(0, 2**33)),
    temp_start=TEMPS,
    temp_end=TEMPS,
    temp_decay_steps=st.one_of(st.integers(1, 60), st.integers(1, 2**40)),
    final_main_weight=st.floats(1e-3, 1.0),
)
examples = settings(max_examples=60, deadline=None)  # the first call of a torch op is slow


def reference_temp(step: int, s: Schedule) -> float:
    elapsed = min(max(step - s.warmup_steps, 0), s.temp_decay_steps)
    return s.temp_start * (s.temp_end / s.temp_start) ** (elapsed / s.temp_decay_steps)


def reference_weight(step: int, s: Schedule) -> float:
    k = step - s.warmup_steps
    if k < 0:
        return 0.0
    ramp = (k + 1) / (s.blend_steps + 1) if k < s.blend_steps else 1.0
    return ramp * s.final_main_weight


@given(STEPS, SCHEDULES)
@examples
def test_values_are_those_of_the_formulas(step, s):
    temp, weight = temp_at(step, s), blend_weight(step, s)
    assert temp.dtype == weight.dtype == torch.float64
    assert temp.shape == weight.shape == ()
    assert temp.item() == pytest.approx(reference_temp(step, s), rel=RTOL, abs=0)
    assert weight.item() == reference_weight(step, s)  # only quotients and products: exact
    tensors = Schedule(*(torch.tensor(x, dtype=DTYPES[type(x)]) for x in s))
    for fn in VALUES:
        assert torch.equal(fn(step, tensors), fn(step, s))


@given(STEPS, st.integers(0, 2**20), SCHEDULES)
@examples
def test_monotone_and_clamped(step, later, s):
    temp, next_temp = temp_at(step, s).item(), temp_at(step + later, s).item()
    if s.temp_end >= s.temp_start:
        temp, next_temp = next_temp, temp
    assert next_temp <= temp * (1 + RTOL)
    low, high = sorted((s.temp_start, s.temp_end))
    assert low * (1 - RTOL) <= temp <= high * (1 + RTOL)

    weight, next_weight = blend_weight(step, s).item(), blend_weight(step + later, s).item()
    assert 0.0 <= weight <= next_weight <= s.final_main_weight


@given(SCHEDULES, st.integers(0, 2**20))
@examples
def test_endpoints_are_exact(s, beyond):
    switch = s.warmup_steps
    for step in (max(switch - 1 - beyond, 0), switch):
        assert temp_at(step, s).item() == s.temp_start
    assert temp_at(switch + s.temp_decay_steps + beyond, s).item() == s.temp_end
    if switch > 0:
        assert blend_weight(max(switch - 1 - beyond, 0), s).item() == 0.0
    assert blend_weight(switch + s.blend_steps + beyond, s).item() == s.final_main_weight


@given(st.lists(STEPS, min_size=1, max_size=9), SCHEDULES)
@examples
def test_int_equals_tensor_equals_tensor_of_steps(steps, s):
    for fn in VALUES:
        from_ints = torch.stack([fn(k, s) for k in steps])
        from_tensors = torch.stack([fn(torch.tensor(k), s) for k in steps])
        assert torch.equal(from_ints, from_tensors)
        # The vectorised power may round the last place otherwise than the scalar one.
        at_once = fn(torch.tensor(steps), s)
        torch.testing.assert_close(at_once, from_ints, rtol=RTOL, atol=0.0)
    small = torch.tensor(steps).remainder(128)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(temp_at(small.to(dtype), s), temp_at(small, s))


@given(STEPS, SCHEDULES)
@examples
def test_phases_partition_the_steps(step, s):
    warmup, blend = in_warmup(step, s), in_blend(step, s)
    assert warmup.dtype == blend.dtype == torch.bool
    assert warmup.item() == (step < s.warmup_steps)
    assert blend.item() == (0 <= step - s.warmup_steps < s.blend_steps)
    weight = blend_weight(step, s).item()
    assert (weight == 0.0) == warmup.item()
    assert (0.0 < weight < s.final_main_weight) == blend.item()


@pytest.mark.parametrize(
    ("s", "table"),
    [
        (Schedule(5, 2), {0: 0.0, 4: 0.0, 5: 1 / 3, 6: 2 / 3, 7: 1.0, 8: 1.0, 1000: 1.0}),
        (Schedule(500, 3), {0: 0.0, 499: 0.0, 500: 0.25, 501: 0.5, 502: 0.75, 503: 1.0}),
        (Schedule(5, 2, final_main_weight=0.75), {4: 0.0, 5: 0.25, 6: 0.5, 7: 0.75, 99: 0.75}),
    ],
)
def test_tables(s, table):
    # 2/3 * 0.75 rounds twice: one unit in the last place.
    for step, weight in table.items():
        assert blend_weight(step, s).item() == pytest.approx(weight, rel=2 * EPS, abs=0)


@pytest.mark.parametrize("base", [2**24, 2**31, 2**40])
def test_steps_float32_cannot_tell_apart(base):
    s = Schedule(base + 1, 7, 0.1, 0.001, 9, 0.5)
    steps = range(base - 3, base + 14)
    assert [in_warmup(k, s).item() for k in steps] == [k <= base for k in steps]
    assert [blend_weight(k, s).item() for k in steps] == [reference_weight(k, s) for k in steps]
    for k in steps:
        assert temp_at(k, s).item() == pytest.approx(reference_temp(k, s), rel=RTOL, abs=0)
    slow = Schedule(0, 2 * base, 0.1, 0.001, 2 * base)
    near = base + torch.arange(4)
    assert (blend_weight(near, slow).diff() > 0).all()
    # Neighbours differ by log(100) / 2 base, many units in the last place up to 2^40.
    assert (temp_at(near, slow).diff() < 0).all()


class Machine:
    """What the two hooks of a training loop do, in plain Python."""

    def __init__(self, s: Schedule, clock: str):
        self.s, self.clock = s, clock
        self.at = {"epoch": 0, "step": 0}
        self.switch = 0 if s.warmup_steps == 0 else None

    def tick(self, kind: str, number: int) -> bool:
        """The answer of the hook: main phase begun (epoch), or the switch is now (step)."""
        self.at[kind] = number
        main = self.at[self.clock] >= self.s.warmup_steps
        if kind == "epoch":
            return main
        switch = main and self.switch is None
        self.switch = number if switch else self.switch
        return switch

    def temp(self) -> float:
        if self.switch is None:
            return self.s.temp_start
        return reference_temp(self.at["step"], self.s._replace(warmup_steps=self.switch))


EVENTS = st.lists(st.tuples(st.sampled_from(["epoch", "step"]), st.integers(0, 30)), max_size=12)
SMALL = st.builds(
    Schedule, st.integers(0, 15), st.integers(0, 6), TEMPS, TEMPS, st.integers(1, 20),
    st.floats(0.1, 1.0),
)  # fmt: skip


@given(SMALL, EVENTS, st.sampled_from(["epoch", "step"]), st.booleans())
@settings(max_examples=120, deadline=None)
def test_transitions_are_those_of_the_machine(s, events, clock, tensors):
    state, machine = P.init_schedule(s), Machine(s, clock)
    start = {"epoch": P.start_epoch, "step": P.start_step}
    for kind, number in [(None, 0), *events]:
        if kind is not None:
            old, before = state, tuple(map(int, state))
            n = torch.tensor(number) if tensors else number
            answer, state = start[kind](state, n, s, clock=clock)
            assert answer.item() == machine.tick(kind, number)
            assert tuple(map(int, old)) == before, "a transition changed its input"
        switch = -1 if machine.switch is None else machine.switch
        assert tuple(map(int, state)) == (machine.at["epoch"], machine.at["step"], switch)
        assert all(x.dtype == torch.int64 and x.shape == () for x in state)
        assert P.state_temp(state, s).item() == pytest.approx(machine.temp(), rel=RTOL, abs=0)
        weight = P.state_weight(state, s, clock=clock).item()
        assert weight == reference_weight(machine.at[clock], s)


@pytest.mark.parametrize("fn", VALUES)
def test_vmap_over_steps_and_schedules(fn):
    def at(step, end):
        return fn(step, Schedule(3, 4, 0.1, end, 6, 0.8))

    steps, ends = torch.arange(12), torch.linspace(0.001, 0.05, 12, dtype=torch.float64)
    want = torch.stack([at(k, e) for k, e in zip(steps, ends, strict=True)])
    torch.testing.assert_close(torch.vmap(at)(steps, ends), want, rtol=RTOL, atol=0.0)


@pytest.mark.parametrize("clock", ["epoch", "step"])
def test_vmap_over_stacked_states(clock):
    s = Schedule(3, 4, 0.1, 0.001, 6)
    states = [ScheduleState(*map(torch.tensor, x)) for x in [(0, 0, -1), (2, 9, -1), (5, 7, 4)]]
    stacked = ScheduleState(*map(torch.stack, zip(*states, strict=True)))

    def tick(state, epoch, step):
        main, state = P.start_epoch(state, epoch, s, clock=clock)
        switch, state = P.start_step(state, step, s, clock=clock)
        return main, switch, *state, P.state_temp(state, s), P.state_weight(state, s, clock=clock)

    epochs, steps = torch.tensor([2, 3, 6]), torch.tensor([2, 10, 8])
    mapped = torch.vmap(tick)(stacked, epochs, steps)
    for got, *want in zip(mapped, *map(tick, states, epochs, steps), strict=True):
        torch.testing.assert_close(got, torch.stack(want), rtol=RTOL, atol=0.0)


def test_compiles_once_for_all_steps():
    torch.compiler.reset()
    counter, s = CompileCounter(), Schedule(5, 4, 0.1, 0.001, 8, 0.75)

    def tick(state, step):
        switch, state = P.start_step(state, step, s)
        values = [f(step, s) for f in VALUES]
        return switch, values, state, P.state_temp(state, s), P.state_weight(state, s)

    compiled = torch.compile(tick, backend=counter, fullgraph=True)
    state = P.init_schedule(s)
    for k in range(20):
        want, got = tick(state, torch.tensor(k)), compiled(state, torch.tensor(k))
        torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)
        state = got[2]
    assert counter.frame_count == 1
    assert state.switch_step.item() == 5


def test_python_steps_settle_after_two_compiles():
    torch.compiler.reset()
    counter, s = CompileCounter(), Schedule(5, 4)
    compiled = torch.compile(lambda k: blend_weight(k, s), backend=counter, fullgraph=True)
    assert [compiled(k).item() for k in range(20)] == [reference_weight(k, s) for k in range(20)]
    assert counter.frame_count == 2  # 0 on its own, then any integer


@pytest.mark.parametrize("kind", ["tensor", "float"])
def test_fields_that_vary_between_calls_of_one_compiled_function(kind):
    # Inductor of torch 2.13 can bake in a Python float that varies. As tensors the fields are
    # inputs of one graph; as floats they cost a graph per value, but must be right too.
    convert = (lambda x: torch.tensor(x, dtype=torch.float64)) if kind == "tensor" else float
    compiled, compiles = compile_fresh(temp_at)
    for i in range(3):
        start, end = 0.1 + 0.01 * i, 0.005 - 0.0005 * i
        temp = compiled(torch.tensor(40), Schedule(3, 9, convert(start), convert(end), 100))
        want = reference_temp(40, Schedule(3, 9, start, end, 100))
        # The compiler may compute the power as exp2 and log2: a relative error of a few EPS
        # times log2(end / start) < 8.
        assert temp.item() == pytest.approx(want, rel=8 * RTOL, abs=0)
    assert compiles() <= (1 if kind == "tensor" else 3)


@pytest.mark.parametrize("step", [1.0, True, "1", None, torch.tensor(1.0), torch.tensor(True)])
def test_a_step_that_is_no_integer_raises(step):
    s, state = Schedule(), P.init_schedule(Schedule())
    transitions = [partial(f, state) for f in (P.start_epoch, P.start_step)]
    for fn in (*VALUES, *transitions):
        with pytest.raises(TypeError, match=r"(step|epoch) must be an int or an integer tensor"):
            fn(step, s)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        *((f, -1, ValueError) for f in ("warmup_steps", "blend_steps", "temp_decay_steps")),
        *((f, 1.5, TypeError) for f in ("warmup_steps", "blend_steps", "temp_decay_steps")),
        ("temp_decay_steps", 0, ValueError),
        *((f, v, ValueError) for f in ("temp_start", "temp_end", "final_main_weight")
          for v in (0.0, -0.1, math.inf, math.nan)),
        ("final_main_weight", 1.001, ValueError),
        ("temp_start", "0.1", TypeError),
    ],
)  # fmt: skip
def test_a_field_out_of_range_raises(field, value, error):
    s = Schedule()._replace(**{field: value})
    for fn in (*(partial(f, 0) for f in VALUES), P.init_schedule):
        with pytest.raises(error, match=field):
            fn(s)


def test_what_is_no_schedule_and_no_state_raises():
    s, state = Schedule(), P.init_schedule(Schedule())
    with_state = [partial(f, state) for f in (P.state_temp, P.state_weight)]
    steps = [partial(f, state, 0) for f in (P.start_epoch, P.start_step)]
    for fn in (*(partial(f, 0) for f in VALUES), P.init_schedule, *with_state, *steps):
        with pytest.raises(TypeError, match="sched must be a Schedule, got dict"):
            fn(s._asdict())
    for fn in P.state_temp, P.state_weight, partial(P.start_step, step=0):
        with pytest.raises(TypeError, match="state must be a ScheduleState, got tuple"):
            fn(tuple(state), sched=s)
    for field in s._fields:
        with pytest.raises(TypeError, match=f"{field} must be a number or a tensor of real"):
            P.temp_at(0, s._replace(**{field: torch.tensor(True)}))


def test_a_step_of_numpy_in_compiled_code():
    compiled, _ = compile_fresh(lambda step: temp_at(step, Schedule(warmup_steps=3)))
    assert compiled(np.int64(5)) == temp_at(5, Schedule(warmup_steps=3))


def test_an_unknown_clock_raises():
    s, state = Schedule(), P.init_schedule(Schedule())
    transitions = [partial(f, state, 0) for f in (P.start_epoch, P.start_step)]
    for fn in (partial(P.state_weight, state), *transitions):
        with pytest.raises(ValueError, match="clock must be 'step' or 'epoch'"):
            fn(s, clock="batch")
