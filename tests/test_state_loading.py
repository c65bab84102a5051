"""Losses that are built empty, filled from a checkpoint, or from less than one."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import proxy_losses as P

from .states import KINDS, Net, assert_alike, going_on, says, step, trained

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
every_kind = pytest.mark.parametrize("kind", KINDS)
either = pytest.mark.parametrize("wrapped", [True, False], ids=["wrapper", "loss"])


def on_meta(kind: str, wrapped: bool) -> Net:
    with torch.device("meta"):
        return Net(kind, wrapped)


def filled(net: Net) -> Net:
    """With the head of every other, which is no state of a loss."""
    torch.manual_seed(0)
    net.head = Net(net.kind, net.wrapped).head
    return net


@functools.cache
def gone() -> list[Tensor]:
    """States of modules that were trained."""
    nets = [trained(kind, wrapped) for kind in KINDS for wrapped in (True, False)]
    return [x for net in nets for x in net.state_dict().values()]


def garbage() -> None:
    """Memory that the next `empty` gets: it held such states."""
    copies = [x.clone() for x in gone()]
    del copies


# -- built on meta


@every_kind
@either
def test_a_meta_module_says_what_it_was_given(kind, wrapped):
    assert says(on_meta(kind, wrapped)) == says(Net(kind, wrapped))


@every_kind
@either
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_is_emptied_starts_anew(kind, wrapped, device):
    net = on_meta(kind, wrapped) if device == "meta" else trained(kind, wrapped)
    for _ in range(3):
        garbage()
        net.to_empty(device="cpu")
        assert says(net) == says(Net(kind, wrapped))
    assert_alike(filled(net), filled(Net(kind, wrapped)))


@every_kind
@either
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_fills_it(kind, wrapped, assign):
    whole, net = trained(kind, wrapped), on_meta(kind, wrapped)
    saved = whole.state_dict()
    if not assign:
        garbage()
        net.to_empty(device="cpu")
    net.load_state_dict(saved, assign=assign)
    assert not any(x.is_meta for x in net.state_dict().values())
    assert_alike(net, whole)  # and neither follows the other


@every_kind
@either
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("lacks", ["everything", "the queue", "all but the queue"])
def test_less_than_a_checkpoint_leaves_no_garbage(kind, wrapped, assign, lacks):
    """Not strict: what is missing has the value of the constructor."""
    whole, net = trained(kind, wrapped), on_meta(kind, wrapped)
    keep = {
        "everything": lambda k: k.startswith("head"),
        "the queue": lambda k: "_queue" not in k,
        "all but the queue": lambda k: k.startswith("head") or "_queue" in k,
    }[lacks]
    saved = {k: x for k, x in whole.state_dict().items() if keep(k)}
    garbage()
    if not assign:
        net.to_empty(device="cpu")
    net.load_state_dict(saved, strict=False, assign=assign)
    want = Net(kind, wrapped)
    want.load_state_dict(saved, strict=False)
    assert_alike(net, want)


def test_a_state_that_stays_on_meta_is_named():
    net = on_meta("ids", False)
    with pytest.raises(RuntimeError, match=r"state of SmoothAPLoss is on the meta device"):
        net.loss(torch.zeros(3, 3), torch.arange(3))
    with pytest.warns(UserWarning, match="no-op"):
        net.load_state_dict(trained("ids", False).state_dict())
    with pytest.raises(RuntimeError, match="meta device"):
        net.loss(torch.zeros(3, 3), torch.arange(3))


@either
def test_reset_parameters_is_the_hook_of_frameworks(wrapped):
    net = trained("labels", wrapped)
    for module in net.modules():
        if hasattr(module, "reset_parameters") and module is not net.head:
            module.reset_parameters()
    assert_alike(net, filled(Net("labels", wrapped)))


@either
def test_memory_that_was_never_written_is_told(wrapped):
    """Frameworks that replace buffers one by one, without a word."""
    net = trained("ids", wrapped)
    for module in net.modules():
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = torch.full_like(buffer, 7)
    with pytest.raises(RuntimeError, match="never filled"):
        going_on(net)
    with pytest.raises(RuntimeError, match="never filled"):
        net.main._queue.enqueue(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
    net.loss.reset()
    assert_alike(net, filled(Net("ids", wrapped)))


# -- through files


@every_kind
@either
def test_through_safetensors(kind, wrapped, tmp_path):
    whole, net = trained(kind, wrapped), Net(kind, wrapped)
    save_model(whole, tmp_path / "model")
    load_model(net, tmp_path / "model")
    assert_alike(net, whole)


@every_kind
@either
@pytest.mark.parametrize("meta", [False, True])
def test_through_a_distributed_checkpoint(kind, wrapped, meta, tmp_path):
    whole = trained(kind, wrapped)
    dcp.save({"model": get_model_state_dict(whole)}, checkpoint_id=tmp_path)
    net = on_meta(kind, wrapped).to_empty(device="cpu") if meta else Net(kind, wrapped)
    state = {"model": get_model_state_dict(net)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(net, state["model"])
    assert_alike(net, whole)


@every_kind
@either
def test_a_distributed_checkpoint_read_in_place(kind, wrapped, tmp_path):
    """Into the buffers themselves, past `load_state_dict`."""
    whole, net = trained(kind, wrapped), Net(kind, wrapped)
    dcp.save(whole.state_dict(), checkpoint_id=tmp_path)
    dcp.load(net.state_dict(), checkpoint_id=tmp_path)
    assert_alike(net, whole)


# -- other options, and other versions


@pytest.mark.parametrize("kind", ["ids", "labels"])
@pytest.mark.parametrize("mine", [None, True, False])
@pytest.mark.parametrize("theirs", [None, True, False])
def test_what_was_left_open_may_be_said_later(kind, mine, theirs):
    right = {None, kind == "labels"}
    if theirs not in right:
        return
    whole = trained(kind, False, multi_label=theirs)
    net = Net(kind, False, multi_label=mine)
    if mine in right:
        net.load_state_dict(whole.state_dict())
        assert_alike(net, whole)
        return
    with pytest.raises(RuntimeError, match=rf"holds rows with .*multi_label={mine} takes"):
        net.load_state_dict(whole.state_dict())
    net.load_state_dict(Net(kind, False, multi_label=theirs).state_dict())  # no rows: no kind


def as_old(net: Net) -> dict:
    """What 0.4 would have saved."""
    saved = copy.deepcopy(net.state_dict())
    head = "loss.main_loss._queue._q_" if net.wrapped else "loss._queue._q_"
    for name in ("seal", "mark", "owner"):
        del saved[head + name]
    labels = saved.pop(head + "labels", None)
    if saved.pop(head + "multi_label", 0):
        saved[head + "targets"] = labels.bool()
    saved[head + "iid"] = saved[head + "iid"].bool()
    if net.kind != "queries":
        saved[head + "query_ids"] = saved[head + "query_ids"][:0]
    if net.wrapped:
        progress = saved.pop("loss._progress").tolist()
        saved["loss._extra_state"] = {
            "clock": "step", "epoch": progress[0], "global_step": progress[1],
            "switch_step": progress[2] if progress[2] >= 0 else None, "batch_hook_seen": True,
            "temperature": net.main.temperature,
        }  # fmt: skip
    return saved


@every_kind
@either
@pytest.mark.parametrize("assign", [False, True])
def test_earlier_checkpoints_load(kind, wrapped, assign):
    whole = trained(kind, wrapped)
    saved = as_old(whole)
    net = on_meta(kind, wrapped) if assign else trained(kind, wrapped, steps=7)
    net.load_state_dict(saved, strict=True, assign=assign)
    assert_alike(net, whole)
    for step_of_both in range(2):
        assert torch.equal(step(net, 60 + step_of_both), step(whole, 60 + step_of_both))


# -- the kind of targets


@pytest.mark.parametrize(
    ("multi_label", "kind", "says"),
    [
        (True, "ids", r"multi_label=True: expected \[N, C\] labels, got \[10\]"),
        (False, "labels", r"multi_label=False: expected \[N\] class ids, got \[10, 3\]"),
    ],
)
@pytest.mark.parametrize("size", [0, 16])
def test_targets_of_the_other_kind_are_named(multi_label, kind, says, size):
    loss = P.SmoothAPLoss(3, queue_size=size, multi_label=multi_label)
    before = copy.deepcopy(loss)
    y = torch.arange(10) % 3 if kind == "ids" else torch.ones(10, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=says):
        loss(torch.randn(10, 3), y)
    assert all(map(torch.equal, loss.buffers(), before.buffers()))
    with pytest.raises(TypeError, match="multi_label"):
        P.SmoothAPLoss(3, multi_label="yes")
    with pytest.raises(ValueError, match="multi_label=True needs num_classes > 1"):
        P.SmoothAPLoss(1, multi_label=True)


def test_labels_replace_ids_and_ids_do_not_come_after_labels():
    net, labels = trained("ids", False), trained("labels", False, multi_label=True)
    fresh = trained("labels", False, steps=0, multi_label=True)
    net.kind = fresh.kind = "labels"
    assert says(net) == says(fresh)
    assert going_on(net) == going_on(fresh)
    net.kind = "ids"
    with pytest.raises(ValueError, match="this queue stores multi-label targets"):
        step(net, 0)
    assert labels.main._queue.state.targets.dtype == torch.bool


def test_what_a_class_of_ones_own_adds_is_not_passed_over():
    class Own(P.SmoothAPLoss):
        def __init__(self):
            super().__init__(1, queue_size=4)
            self.register_buffer("mean", torch.zeros(2))

    with pytest.raises(RuntimeError, match=r'Missing key.*"mean"'):
        Own().load_state_dict(P.SmoothAPLoss(1, queue_size=4).state_dict())
    Own().load_state_dict(Own().state_dict())
