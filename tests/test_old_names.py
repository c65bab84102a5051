"""Names of 0.4 work with a warning that names the new one."""

import contextlib
import inspect
import warnings

import pytest
import torch

import proxy_losses as P
from proxy_losses._old_names import ARGUMENTS, NAMES, takes_old_names

X = torch.linspace(-1, 1, 6)[:, None] * torch.tensor([1.0, -1, 1, -1, 1, -1])[:, None]
Y = torch.arange(6) % 2
Q = torch.arange(6) // 3
LOSSES = [P.SmoothAPLoss, P.RecallAtQuantileLoss, P.PAUCAtBudgetLoss]
FUNCTIONS = [P.smooth_ap_loss, P.recall_at_quantile_loss, P.partial_auc_loss]


@contextlib.contextmanager
def deprecated(*names):
    """One warning for each name, attributed to a line of this file."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", DeprecationWarning)
        yield
    assert [w.category for w in found] == [DeprecationWarning] * len(names)
    for w, name in zip(found, names, strict=True):
        assert name in str(w.message)
        assert {**ARGUMENTS, **NAMES}[name] in str(w.message)
        assert w.filename == __file__


@pytest.mark.filterwarnings("ignore:.*dispersion")  # few rows for a band
@pytest.mark.parametrize("make", LOSSES)
def test_modules(make):
    with deprecated("group_shape"):
        old = make(1, queue_size=8, group_shape=(4, 8))
    new = make(1, queue_size=8, query_shape=(4, 8))
    assert old.query_shape == new.query_shape == (4, 8)
    for _ in range(2):  # the second call reads the stored ids
        with deprecated("groups"):
            found = old(X, Y, groups=Q)
        assert found == new(X, Y, query_ids=Q)
    compiled = torch.compile(old, backend="eager", fullgraph=True)
    assert compiled(X, Y, groups=Q) == new(X, Y, query_ids=Q)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function):
    with deprecated("groups", "group_shape"):
        old = function(X, Y, None, 0.1, groups=Q, group_shape=(2, 3))
    assert old == function(X, Y, None, 0.1, query_ids=Q, query_shape=(2, 3))


def test_queue_and_lists():
    with deprecated("groups"):
        old = P.enqueue(P.init_queue(8, 1), X, Y, groups=Q)
    assert torch.equal(old.query_ids, P.enqueue(P.init_queue(8, 1), X, Y, query_ids=Q).query_ids)
    with deprecated("groups"):
        lists = P.query_lists(groups=Q, num_lists=2, list_length=3)
    assert torch.equal(lists.rows, P.query_lists(Q, 2, 3).rows)


@pytest.mark.parametrize("old", NAMES)
def test_names_of_functions(old):
    with deprecated(old):
        found = getattr(P, old)
    assert found is getattr(P, NAMES[old])


def test_a_name_that_never_was():
    with pytest.raises(AttributeError, match=r"'proxy_losses' has no attribute 'groups'"):
        P.groups  # noqa: B018
    assert not hasattr(P, "group_shape")


def wrapper(main):
    return P.LossWarmupWrapper(lambda x, y: x.sum(), main, warmup_steps=1, blend_steps=1)


def test_the_wrapper_in_every_phase():
    old, new = (wrapper(P.SmoothAPLoss(1)) for _ in range(2))
    for step in range(3):
        old.on_train_batch_start(step)
        new.on_train_batch_start(step)
        with deprecated("groups"):
            found = old(X, Y, groups=Q)
        assert found == new(X, Y, query_ids=Q)


class Own(torch.nn.Module):
    temperature = 1.0

    def forward(self, logits, targets, groups=None):
        return groups.sum()


def test_a_loss_with_such_an_argument_of_its_own_gets_it():
    loss = wrapper(Own())
    loss.on_train_batch_start(3)
    with deprecated():
        assert loss(X, Y, groups=Q) == Q.sum()
    unknown = wrapper(Own())
    unknown.main_loss.forward = torch.dot  # Python knows no signature of it
    with deprecated("groups"):
        unknown(X, Y, groups=Q)


def test_both_names_are_too_many():
    message = "groups= is the old name of query_ids=: expected one, got both"
    loss = P.SmoothAPLoss(1, queue_size=8)
    with pytest.raises(TypeError, match=message):
        loss(X, Y, groups=Q, query_ids=Q)
    assert loss._queue.state.enqueued == 0
    with pytest.raises(TypeError, match=message):
        P.smooth_ap_loss(X, Y, None, 0.1, groups=None, query_ids=Q)
    with pytest.raises(TypeError, match="group_shape= is the old name of query_shape="):
        P.SmoothAPLoss(1, group_shape=(1, 2), query_shape=(1, 2))


def test_where_there_was_no_such_name_there_is_none():
    with pytest.raises(TypeError, match=r"SmoothAPLoss.__init__\(\) got an unexpected.*'groups'"):
        P.SmoothAPLoss(1, groups=Q)
    with pytest.raises(TypeError, match="unexpected keyword argument 'groups'"):
        P.SigmoidFocalLoss()(X, Y, groups=Q)


def test_signatures_show_the_new_names_alone():
    for function in (*LOSSES, *FUNCTIONS, P.enqueue, P.query_lists, P.SmoothAPLoss.forward,
                     P.LossWarmupWrapper.forward):  # fmt: skip
        names = inspect.signature(function).parameters
        assert not ARGUMENTS.keys() & names
        assert function.__doc__
    assert takes_old_names(Own.forward)(None, X, Y, groups=Q) == Q.sum()
