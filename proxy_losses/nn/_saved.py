"""Checkpoints, looked through before anything of them is loaded: a loss loads whole or not at all.

What lies outside the losses is torch's: `load_state_dict` of an outer module may have loaded other
parts before the error, and keys that are missing or too many it reports after loading the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .._checks import check_int, check_temperature, is_labels
from .._queue import QueueState


def refuse(module: nn.Module, problems: list[str]) -> None:
    """Raise `RuntimeError`, as `load_state_dict` does, if there are problems."""
    if problems:
        lines = "\n\t".join(problems)
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(module).__name__}, of which nothing was "
            f"loaded:\n\t{lines}"
        )


def queue_problems(queue: QueueState, saved: Mapping[str, Any], prefix: str) -> list[str]:
    """What keeps the saved rows from being loaded into this queue; none if there are none saved."""
    capacity, classes = queue.logits.shape
    shapes: dict[str, list[tuple[int, ...]]] = {
        "_q_logits": [(capacity, classes)],
        "_q_targets": [(capacity,), (capacity, classes)],
        "_q_weight": [(capacity,)],
        "_q_iid": [(capacity,)],
        "_q_enqueued": [()],
        "_q_ptr": [(1,), ()],
        "_q_query_ids": [(0,), (capacity,)],
    }
    found = {name: saved[prefix + name] for name in shapes if prefix + name in saved}
    if not found:
        return []
    needed = {"_q_logits", "_q_targets"}
    needed |= {"_q_ptr"} if "_q_ptr" in found else {"_q_weight", "_q_iid", "_q_enqueued"}
    if missing := sorted(needed - set(found)):
        return [f"the queue is incomplete: {prefix} lacks {', '.join(missing)}"]
    for name, x in found.items():
        if not isinstance(x, Tensor):
            return [f"{prefix}{name} must be a tensor, got {type(x).__name__}"]
    rows = found["_q_logits"].shape
    if len(rows) == 2 and rows != (capacity, classes):
        return [
            f"size mismatch for {prefix}_q_logits: the checkpoint has queue_size={rows[0]} and "
            f"num_classes={rows[1]}, this module queue_size={capacity} and num_classes={classes}"
        ]
    problems = [
        f"size mismatch for {prefix}{name}: expected {' or '.join(str(list(s)) for s in allowed)}, "
        f"got {list(found[name].shape)}"
        for name, allowed in shapes.items()
        if name in found and found[name].shape not in allowed
    ]
    targets = found["_q_targets"]
    if targets.dim() == 2 and not problems and not is_labels(targets):
        problems.append(f"{prefix}_q_targets [N, C] must be bool, got {targets.dtype}")
    count = found["_q_ptr" if "_q_ptr" in found else "_q_enqueued"]
    if not problems and not count.is_meta and int(count) < 0:
        problems.append(f"{prefix} must have stored 0 rows or more, got {int(count)}")
    return problems


def number_problems(
    saved: Mapping[str, Any], key: str, check: Callable[[str, Any], None]
) -> list[str]:
    """Whether a saved tensor is one number that passes the check; nothing if it was not saved."""
    if key not in saved:
        return []
    x = saved[key]
    if isinstance(x, Tensor) and x.is_meta:
        return []
    if not isinstance(x, Tensor) or x.numel() != 1:
        return [f"{key} must be a tensor of one number, got {x!r:.80}"]
    return _problems(check, key, x.item())


def schedule_problems(state: object, clock: str) -> list[str]:
    """What keeps a wrapper from continuing from this extra state; keys may be missing."""
    if not isinstance(state, Mapping):
        return [f"the schedule's state must be a dict, got {type(state).__name__}"]
    saved_clock = state.get("clock", clock)
    if saved_clock != clock:
        return [
            f"the checkpoint is of a warmup counted in {saved_clock}s and this wrapper's is in "
            f"{clock}s (warmup_epochs, warmup_steps)"
        ]
    problems = []
    for name, minimum in (("epoch", None), ("global_step", None), ("switch_step", -1)):
        if name in state and (name != "switch_step" or state[name] is not None):
            problems += _problems(check_int, name, state[name], minimum)
    if not isinstance(state.get("batch_hook_seen", False), bool):
        problems.append(f"batch_hook_seen must be a bool, got {state['batch_hook_seen']!r:.80}")
    if state.get("temperature") is not None:
        problems += _problems(check_temperature, "temperature", state["temperature"])
    return problems


def _problems(check: Callable[..., None], *args: Any) -> list[str]:
    try:
        check(*args)
    except (TypeError, ValueError) as error:
        return [str(error)]
    return []
