"""The ranking losses as modules: arguments, warnings, degenerate input, queue, precision."""

import copy
import inspect
import math

import pytest
import torch

import proxy_losses as P

from .makers import FUNCTIONS, PAD, batch, every_loss, pauc, recall, same_rows, smooth, warned


@every_loss
@pytest.mark.parametrize(
    ("name", "out_of_range", "of_wrong_type"),
    [
        ("num_classes", [0, -1], [2.5, "2"]),
        ("queue_size", [-1], [1.5, None]),
        ("temperature", [0.0, -1.0, math.nan, math.inf], ["warm", None]),
        ("reduction", ["median", None], []),
        ("max_pool_size", [0, -3], [1.5]),
        ("quantile", [0.0, 1.0, -0.1, 2, math.nan], ["0.1", None]),
        ("quantile_interpolation", ["cubic", None], []),
    ],
)
def test_a_bad_argument_is_named(make, name, out_of_range, of_wrong_type):
    make = recall if name.startswith("quantile") else make
    for values, errors in (out_of_range, ValueError), (of_wrong_type, (ValueError, TypeError)):
        for value in values:
            with pytest.raises(errors, match=name):
                make(**{name: value})


@every_loss
def test_arguments_are_readable_and_have_the_published_defaults(make):
    given = {
        "num_classes": 3, "quantile": 0.1, "queue_size": 7, "temperature": 2, "reduction": "sum",
        "ignore_index": -1, "update_queue_in_eval": True, "gather_distributed": False,
        "quantile_interpolation": "linear", "max_pool_size": 99,
        "temperature_unit": "spread", "query_shape": (2, 3), "distributed": "gather",
        "alpha": 0.125, "beta": 0.25,
        "surrogate": "pairwise", "n_knots": 4, "tau_scale": "band", "pos_numerator": "live",
        "budget_basis": "population",
    }  # fmt: skip
    cls = type(make())
    names = list(inspect.signature(cls).parameters)
    given |= {o.attribute: o.choices[-1] for o in cls._metric.options if o.choices}
    given = {n: p.default for n, p in inspect.signature(cls).parameters.items()} | given
    module, default = cls(**{n: given[n] for n in names}), cls(2)
    assert {n: getattr(module, n) for n in names} == {n: given[n] for n in names}
    assert type(module.temperature) is float
    published = {
        "queue_size": 1024, "reduction": "mean", "ignore_index": -100, "max_pool_size": None,
        "temperature": 0.1 if make is pauc else 0.01, "quantile": 0.005, "alpha": 0.0,
        "beta": 0.005, "surrogate": "trapezoid", "n_knots": 2, "tau_scale": "iqr",
        "pos_numerator": "pool", "budget_basis": "fpr", "quantile_interpolation": "higher",
        "gather_distributed": None, "update_queue_in_eval": False,
    }  # fmt: skip
    if make is not pauc:
        del published["surrogate"]  # others have surrogates of their own
    for name in published.keys() & set(names):
        assert getattr(default, name) == published[name], name


@every_loss
def test_temperature_is_writable_and_survives_a_bad_assignment(make):
    module, cold = make(queue_size=0), make(queue_size=0, temperature=0.03)
    module.temperature = 0.03
    assert torch.equal(module(*batch(0)), cold(*batch(0)))
    with pytest.raises(ValueError, match="temperature"):
        module.temperature = -1.0
    assert module.temperature == 0.03
    assert torch.equal(module(*batch(0)), cold(*batch(0)))


@every_loss
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logits": torch.zeros(4)}, "logits must be"),
        ({"logits": torch.zeros(4, 3)}, "num_classes=2"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets must be"),
        ({"targets": torch.zeros(4, 2, dtype=torch.int64)}, "targets must be"),
        ({"targets": torch.zeros(4, 3)}, "targets must be"),
        ({"iid_mask": torch.ones(3, dtype=torch.bool)}, "iid_mask"),
        ({"iid_mask": torch.ones(4)}, "iid_mask must be a bool tensor"),
        ({"sample_weight": 2.0}, "sample_weight must be"),
        ({"sample_weight": torch.ones(3)}, "sample_weight must match logits dim-0"),
        ({"sample_weight": torch.tensor([1.0, -1.0, 1.0, 1.0])}, "non-negative"),
        ({"sample_weight": torch.tensor([1.0, math.nan, 1.0, 1.0])}, "finite"),
    ],
)
def test_a_bad_batch_raises_and_is_not_stored(make, change, says):
    module = make(num_classes=2)
    if module._graded and getattr(change.get("targets"), "shape", None) == (4, 2):
        change = {"targets": torch.zeros(4, 2, dtype=torch.complex64)}  # grades are real
    good = {"logits": torch.zeros(4, 2), "targets": torch.tensor([0, 1, 0, 1])}
    with pytest.raises((ValueError, TypeError), match=says):
        module(**{**good, **change})
    assert module._queue.state.enqueued == 0


def test_only_recall_checks_the_range_of_class_ids():
    logits, targets, module = torch.zeros(4, 2), torch.tensor([0, 1, 2, PAD]), recall(num_classes=2)
    with pytest.raises(ValueError, match="outside"):
        module(logits, targets)
    assert module._queue.state.enqueued == 0
    assert smooth(num_classes=2)(logits, targets).isfinite()


@every_loss
def test_forms_of_targets_and_the_third_argument(make):
    (logits, ids), module = batch(1, 6), make(queue_size=0)
    want = module(logits, ids)
    for targets in (ids[:, None], ids.float(), ids.float()[:, None], ids.to(torch.int32)):
        assert torch.equal(module(logits, targets), want)
    mask = torch.tensor([True] * 5 + [False])
    for args in ((True,), (None, True), (mask, True)):
        loss, per_class, valid = module(logits, ids, *args)
        assert torch.equal(loss, want)
        assert (per_class.shape, valid.tolist()) == ((1,), [True])
    assert torch.equal(module(logits, ids, False), want)
    assert make(reduction="none")(logits, ids).shape == (1,)
    wide, labels = torch.randn(6, 3), torch.rand(6, 3) < 0.5
    labels[0], labels[1] = True, False
    columns = [module(wide[:, c, None], labels[:, c]) for c in range(3)]
    for targets in (labels, labels.float()):
        each = make(queue_size=0, num_classes=3, reduction="none")(wide, targets)
        torch.testing.assert_close(each, torch.stack(columns))


@every_loss
def test_warnings_name_the_line_of_the_caller(make):
    (logits, targets), losses = batch(2, 8), []
    texts = warned(lambda: losses.append(make()(logits, torch.where(targets == 1, 7, targets))))
    if not make()._graded:  # 7 is a grade
        assert "expects targets in" in texts.pop()
    assert texts == []
    assert torch.equal(losses[0], make()(logits, targets))
    module = make(max_pool_size=6)
    (text,) = warned(lambda: [module(logits, targets) for _ in range(3)])
    assert type(module).__name__ in text
    module, zeros = make(), torch.zeros(8)
    assert warned(lambda: module(logits[:0], targets[:0], sample_weight=zeros[:0])) == []
    (text,) = warned(lambda: [module(logits, targets, sample_weight=zeros) for _ in range(3)])
    assert "sample_weight is entirely zero" in text


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_classes_that_do_not_count(make, reduction):
    # Class 0 has positives alone, the others no positive: only recall is defined, for class 0.
    logits, targets = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 0, 0, PAD])
    loss, per_class, valid = make(num_classes=3, reduction=reduction)(logits, targets, True)
    lenient = not type(make())._metric.needs_negative
    counts = [lenient, False, False]
    assert (valid.dtype, valid.tolist()) == (torch.bool, counts)
    assert (~per_class.isnan()).tolist() == counts
    if reduction == "none":
        assert torch.equal(loss.isnan(), per_class.isnan())
    else:
        assert loss.item() == (per_class[0].item() if lenient else 0.0)
    loss.nansum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 1:] == 0).all()


@every_loss
@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_pool_of_padding_is_zero_and_stores_nothing(make, n, reduction):
    module, logits = make(num_classes=2, reduction=reduction), torch.randn(n, 2, requires_grad=True)
    loss, per_class, valid = module(logits, torch.full((n,), PAD), True)
    assert loss.tolist() == ([0.0, 0.0] if reduction == "none" else 0.0)
    assert (per_class.isnan() & ~valid).all()
    loss.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(n, 2))
    assert module._queue.state.enqueued == 0


@every_loss
def test_weights_count_at_positives_alone(make):
    (logits, targets), module, weight = batch(3, 12), make(queue_size=0), torch.rand(12) + 0.1
    want = module(logits, targets, sample_weight=weight)
    assert module(logits, targets, sample_weight=weight.double()).dtype == torch.float32
    scaled = torch.where(targets == 1, 4.0 * weight, torch.rand(12))  # a power of 2: no rounding
    assert torch.equal(module(logits, targets, sample_weight=scaled), want)
    ones = module(logits, targets, sample_weight=torch.ones(12, dtype=torch.int64))
    assert torch.equal(ones, module(logits, targets))
    loss, _, valid = module(logits, targets, True, sample_weight=weight * (targets != 1))
    assert (loss.item(), valid.tolist()) == (0.0, [False])


@every_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_a_number_shows_in_rows_that_count_alone(make, bad):
    (logits, targets), module, clean = batch(4, 6), make(), make()
    spoilt = torch.where(targets[:, None] == PAD, bad, logits.detach()).requires_grad_()
    for _ in range(2):  # live, then stored too
        loss = module(spoilt, targets)
        assert torch.equal(loss, clean(logits, targets))
    loss.backward()
    assert spoilt.grad.isfinite().all()
    assert make()(torch.where(targets[:, None] == 0, bad, logits), targets).isnan()


@every_loss
@pytest.mark.parametrize("classes", [1, 3])
def test_is_the_functional_form_with_a_memory(make, classes):
    module, queue = make(num_classes=classes), P.init_queue(8, classes)
    function = FUNCTIONS[make]
    for seed, n in enumerate([3, 0, 5, 8, 20, 1, 6, 4]):
        (a, targets), (b, _) = batch(seed, n, classes), batch(seed, n, classes)
        weight = torch.rand(n) if seed % 3 else None
        module.temperature = tau = 0.5 / (seed + 1)
        loss = module.train(seed != 5)(a, targets, sample_weight=weight)
        want, new = function(b, targets, queue, tau, sample_weight=weight)
        queue = new if module.training else queue  # in eval the queue is read, not written
        assert same_rows(module, queue)
        (loss + want).backward()
        assert all(map(torch.equal, (loss, a.grad), (want, b.grad)))
    module.reset_queue()
    assert same_rows(module, P.init_queue(8, classes))


@every_loss
@pytest.mark.parametrize("live", [torch.float32, torch.float64])
def test_stored_rows_rank_with_their_weights_and_no_gradient(make, live):
    module, alone = make(queue_size=4), make(queue_size=0)
    (old, old_targets), (new, targets) = batch(7, 6), batch(6, 5)
    weight, flags = torch.rand(6), torch.arange(6) % 2 == 0
    module(old, old_targets, flags, sample_weight=weight)
    module.eval()
    loss = module(new.to(live), targets)
    # Of the first batch the last four rows, padding and two positives, in the live dtype.
    rows = torch.cat([new, old[2:].detach()]).to(live), torch.cat([targets, old_targets[2:]])
    ones = torch.ones(5)
    want = alone(
        *rows, torch.cat([ones.bool(), flags[2:]]), sample_weight=torch.cat([ones, weight[2:]])
    )
    assert loss.dtype == live
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert old.grad is None
    assert sorted(module._queue.state.iid_mask.tolist()) == sorted(flags[2:].tolist())
    assert module._queue.state.enqueued == 8  # a full turn
    module.update_queue_in_eval = True
    module(new, targets)
    assert module._queue.state.enqueued == 16


@every_loss
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_logits_are_computed_in_float32(make, half):
    module, single = make(), make()
    for seed in range(3):
        logits, targets = batch(seed)
        loss, want = module(logits.to(half), targets), single(logits.to(half).float(), targets)
        torch.testing.assert_close(loss, want, rtol=0.0, atol=0.0)  # and the same dtype


@every_loss
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts_keep_queue_and_temperature_exact(make, cast):
    module, plain = make(temperature=0.0123), make(temperature=0.0123)
    for m in (module, plain):
        m(*batch(0))
        m._queue._q_enqueued += 100_003 - 5  # no half number, slot 3 of 8
        m._queue._sign()
    getattr(module, cast)()
    for seed in range(1, 4):
        assert torch.equal(module(*batch(seed)), plain(*batch(seed)))
    assert module.temperature == 0.0123


@pytest.mark.filterwarnings("ignore:.*max_pool_size")
@every_loss
def test_a_capped_pool_is_drawn_the_same_everywhere_and_keeps_rare_rows(make):
    logits, targets = torch.linspace(-1.0, 1.0, 1000)[:, None], torch.zeros(1000, dtype=torch.int64)
    targets[0] = targets[-1] = 1  # the rare rows are the last and the first
    capped, twin = (make(queue_size=1000, max_pool_size=100, temperature=1e-5) for _ in "ab")
    draws = [capped.eval()(logits, targets) for _ in range(10)]
    assert [twin.eval()(logits, targets) for _ in range(10)] == draws
    # Ranks 1 and 100 of 100 rows: (1/1 + 2/100) / 2, and the first is 1. Precision: one of three
    # places. NDCG: discounts of places 1 and 100 over those of 1 and 2. Of the others each finds
    # one of two right.
    ndcg = 1 - (1 + 1 / math.log2(101)) / (1 + 1 / math.log2(3))
    known = {"smooth_ap": 0.49, "smooth_mrr": 0.0, "precision_at_k": 2 / 3, "smooth_ndcg": ndcg}
    want = known.get(make.__name__, 0.5)
    assert [x.item() for x in draws] == pytest.approx([want] * 10)
    capped.train()(logits, targets)
    assert capped._queue.state.enqueued == 1000  # the cap limits ranking, not storing
    mixed, capped.temperature = (torch.randn(1000, 1), torch.arange(1000) % 2), 1.0
    assert len({capped(*mixed).item() for _ in range(4)}) == 4, "every step draws anew"
    roomy, free = make(max_pool_size=13), make()
    assert [roomy(*batch(k)) for k in range(4)] == [free(*batch(k)) for k in range(4)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_flags_may_be_integers(dtype):
    module, twin = pauc(), pauc()
    logits, targets = torch.randn(12, 1), torch.arange(12) % 3 == 0
    flags = torch.arange(12) % 2 == 0
    for _ in range(2):  # live, and stored
        assert torch.equal(module(logits, targets, flags.to(dtype)), twin(logits, targets, flags))
    assert not torch.equal(twin(logits, targets), pauc()(logits, targets))


def test_other_buffers_may_stand_in_for_those_of_the_queue():
    rows = torch.tensor([[0.5], [0.2], [0.1], [0.4]]), torch.tensor([0, 1, 0, 1])
    weighed, plain = (P.SmoothAPLoss(1, queue_size=8, temperature=0.1) for _ in range(2))
    weighed(*rows, sample_weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    weighed.eval()
    plain.eval()
    assert plain(*rows) != weighed(*rows)
    lent = dict(weighed.named_buffers())
    assert torch.func.functional_call(plain, lent, rows) == weighed(*rows)
    kept = plain._queue.state  # alive beside the new ones
    plain.load_state_dict(weighed.state_dict(), assign=True)
    assert plain(*rows) == weighed(*rows)
    assert plain._queue.state.sample_weight is not kept.sample_weight


@every_loss
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*:DeprecationWarning")
def test_a_traced_module_goes_on_as_the_module(make):
    module = make()
    module(*batch(0))
    traced = torch.jit.trace(copy.deepcopy(module), batch(1), check_trace=False)
    traced.load_state_dict(module.state_dict())
    for k in (2, 3):
        assert torch.equal(traced(*batch(k)), module(*batch(k)))
    assert all(map(torch.equal, traced.buffers(), module.buffers()))
