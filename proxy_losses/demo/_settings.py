"""The knobs of a run and their defaults."""

from __future__ import annotations

from typing import NamedTuple


class Settings(NamedTuple):
    """What both arms share; the ranking loss alone uses queue and temperatures."""

    hidden: int = 32
    warmup_epochs: int = 12
    blend_epochs: int = 4
    total_epochs: int = 40
    batch_size: int = 128
    queue_size: int = 1024
    temp_start: float = 0.25
    temp_end: float = 0.05
    lr: float = 3e-3
    seed: int = 0
