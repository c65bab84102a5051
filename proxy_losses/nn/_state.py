"""State in buffers, through what frameworks do to a module: build, move, copy, empty and load it.

Every number of a state has one home, a persistent buffer whose shape and dtype are those of the
constructor. It is written in place and never replaced by this package, so that compiled code, CUDA
graphs and copies that follow it by its buffers keep what they hold; attributes read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class StateModule(nn.Module):
    """A module whose buffers are state: moved, but not rounded, and never left without a value."""

    def add_state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Register a buffer; `fill` gives it its value."""
        # What is made under inference mode could not be written in training.
        with torch.inference_mode(False):
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    def fill(self) -> None:
        """Write the state of a module just made into the buffers of this one, not of its parts."""

    def reset_parameters(self) -> None:
        """`fill`, by the name that frameworks call after `to_empty`."""
        self.fill()

    @property
    def _is_hf_initialized(self) -> bool:
        return bool(self.__dict__.get("_filled_for_hf", False))

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        """Set by transformers when it should have filled what it did not load.

        What it loaded bears the same mark; the rest is whatever was in memory.
        """
        self.__dict__["_filled_for_hf"] = value
        if value and not all(getattr(b, "_is_hf_initialized", False) for b in self._own_buffers()):
            self.fill()

    def _own_buffers(self) -> list[Tensor]:
        return [b for b in self._buffers.values() if b is not None]

    def _numbers(self) -> list[Any] | None:
        """The small buffers by value; None where there are no values, as on the meta device."""
        try:
            return [b.tolist() for b in self._own_buffers() if b.numel() < 10]
        except RuntimeError:
            return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        own = {id(b) for b in self._own_buffers()}

        def apply(t: Tensor) -> Tensor:
            moved = fn(t)
            if id(t) not in own:  # a parameter, of a class derived from this one
                return moved
            wider = moved.is_floating_point() and t.is_floating_point()
            wider = wider and moved.element_size() > t.element_size()
            return moved if moved.dtype == t.dtype or wider else t.to(moved.device)

        if recurse:  # a part that is no state, such as a warmup loss with class weights, is cast
            for module in self.children():
                module._apply(fn)
        before = self._numbers()
        with torch.inference_mode(False):
            super()._apply(apply, recurse=False)  # type: ignore[no-untyped-call]
        after = self._numbers()
        if after is not None and after != before:  # `to_empty`, of which only this tells
            self.fill()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._own()

    def _own(self) -> None:
        """Replace what inference mode has made of a copy or of a loaded buffer."""
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_inference():
                with torch.inference_mode(False):
                    self._buffers[name] = buffer.clone()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Load into buffers of one's own; with ``assign=True`` leave none on the meta device."""
        assigns = local_metadata.get("assign_to_params_buffers", False)
        if assigns:  # a checkpoint that stays in use must not follow the training
            for name, buffer in self._buffers.items():
                x = state_dict.get(prefix + name)
                if buffer is not None and isinstance(x, Tensor):
                    state_dict[prefix + name] = x.detach().to(buffer.dtype, copy=True)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        if assigns:
            self._fill_rest(prefix, state_dict)
        self._own()

    def _fill_rest(self, prefix: str, found: dict[str, Any]) -> None:
        rest = [n for n, b in self._buffers.items() if b is not None and prefix + n not in found]
        if not any(self._buffers[n].is_meta for n in rest):  # type: ignore[union-attr]
            return
        loaded = {n: b for n, b in self._buffers.items() if n not in rest}
        for name in rest:
            self._buffers[name] = torch.empty_like(self._buffers[name], device="cpu")  # type: ignore[arg-type]
        kept = {n: b.clone() for n, b in loaded.items() if b is not None}
        self.fill()
        for name, value in kept.items():
            loaded[name].copy_(value)  # type: ignore[union-attr]


def guard(x: Tensor, sound: Tensor, message: str) -> Tensor:
    """Pass x on if sound; for compiled code and off the CPU, where Python must not wait.

    If not, the CPU raises RuntimeError, and other devices return NaN: an error there would leave
    the device unusable. So do transforms of torch.func, which know no assertion.
    """
    if sound.is_cpu and not torch._C._are_functorch_transforms_active():
        torch._assert_async(sound, message)
        return x
    return torch.where(sound.to(x.device), x, torch.nan)
