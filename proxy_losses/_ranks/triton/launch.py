"""From tensors to kernels: which method, buffers of sizes that follow from shapes, launches.

`pair_sums` and `rank_mean` are what the ops of the same names compute on the CPU, see `op.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._numerics import clean, positive_weight
from ..phi import PHIS
from ..plan import bin_width, cell_width
from . import kernels
from .phi import TWINS

SHORT = 2048  # rows of lists that are always visited pair by pair
FEW_PAIRS = 1 << 29  # rows^2 over all lists up to which longer ones are
LONGEST = 4096  # rows of a bin at most, so that no program takes much longer than another
PROGRAMS = 1056  # that share the bins; a multiple of the processors of a large card
MANY_ROWS = 1 << 22  # from here on four times as many
STRETCH_REACH = 4.0  # z sigma'(z) and the entropy fall later than sigma': by ln K, and K < 50


class _Bins(NamedTuple):
    """Sorted rows, cut into bins; R = L M rows, at most BINS bins."""

    scores: Tensor  # [L, M] the largest first
    order: Tensor  # [L, M] int64, row of a sorted row
    code: Tensor  # [L, M] int8
    weight: Tensor  # [L, M] weights in sorted order, or anything
    bin: Tensor  # [L, M] int32, 1 + bin of a sorted row
    starts: Tensor  # [BINS + 1] sorted row at which a bin starts
    first: Tensor  # [L + 1] int32, first bin of every list
    bad: Tensor  # [L, PARTS] int32, rows that are not finite
    room: int  # BINS
    nodes: int
    reach: float  # in tau; further rows count as 1 or 0


def computed_in(dtype: torch.dtype, rtol: float) -> torch.dtype:
    """Float32 sums reach 1e-6."""
    return torch.float64 if dtype == torch.float64 or rtol < 1e-6 else torch.float32


def takes_pairs(lists: int, rows: int, method: str) -> bool:
    """Whether pairs are visited one by one, decided by shapes alone."""
    if method == "auto":
        return rows <= SHORT or lists * rows * rows <= FEW_PAIRS
    return method == "dense"


def pair_sums(
    scores: Tensor, weights: Tensor, at: Tensor, tau: Tensor, kinds: str, rtol: float, method: str
) -> list[Tensor]:
    """Sums over pairs [L, G, M], one for each of up to two kinds."""
    (lists, rows), groups = scores.shape, weights.shape[1]
    names = kinds.split(",")
    out = scores.new_empty(len(names), lists, groups, rows)
    if not out.numel():
        return list(out.zero_())
    asked = plain(at)
    sums = _Sums(
        scores.contiguous(), plain(weights),
        (asked, asked.stride(0), asked.stride(1) if at.shape[1] > 1 else 0), tau.contiguous(),
        names, out, computed_in(scores.dtype, rtol),
    )  # fmt: skip
    if takes_pairs(lists, rows, method):
        _dense_sums(sums, at.shape[1])
    else:
        _binned_sums(sums, rtol)
    return list(out)


class _Sums(NamedTuple):
    """What is to be summed, and where to."""

    scores: Tensor  # [L, M]
    weights: Tensor  # [L, G, M]
    asked: tuple[Tensor, int, int]  # targets, and their strides from list to list, group to group
    tau: Tensor  # [L]
    names: list[str]  # one or two kinds
    out: Tensor  # [kinds, L, G, M]
    kind: torch.dtype  # computed in

    @property
    def how(self) -> dict[str, Any]:
        """Of the kernels of either method."""
        first, second = (*self.names, "")[:2]
        return {"FIRST": first, "SECOND": second, "TWO": self.weights.shape[1] > 1}

    @property
    def turns(self) -> int:
        """Programs that share the groups, two to each."""
        return (self.weights.shape[1] + 1) // 2


def _dense_sums(sums: _Sums, asked_groups: int) -> None:
    scores, weights, asked, tau, names, out, kind = sums
    _, lists, groups, rows = out.shape
    tile = _Tile(lists * sums.turns, rows, kind)
    listed = _list(scores, asked, asked_groups, weights, tau, None, listed=True)
    part = scores.new_empty((tile.split, *out.shape), dtype=kind)
    other = weights[:, 1:] if groups > 1 else weights
    kernels.pair_sums[tile.grid](
        scores, listed.rows, listed.counts, tau, weights, other, weights.stride(0),
        weights.stride(1), part, rows, lists, groups, tile.split, **sums.how, REST=False,
        DT=TYPES[kind], BT=tile.targets, BS=tile.sources, num_warps=4,
    )  # fmt: skip
    kernels.add_parts[(triton.cdiv(rows, 1024), len(names) * lists * groups)](
        part, listed.place, *asked, listed.bad, out, rows, lists, groups, tile.split, len(names),
        DT=TYPES[kind], BLOCK=1024,
    )  # fmt: skip


def _binned_sums(sums: _Sums, rtol: float) -> None:
    scores, weights, asked, tau, names, out, kind = sums
    _, lists, groups, rows = out.shape
    reach = 0.0 if {"stretch", "entropy"}.isdisjoint(names) else STRETCH_REACH
    bins = _cut(scores, None, None, None, tau, rtol, kind)
    bins = bins._replace(reach=bins.reach + reach)
    slots = bins.room * bins.nodes
    base, x, mu = _split(scores.new_empty((2 + groups) * slots, dtype=kind), slots, 2)
    given = weights.stride(0), weights.stride(1)
    above, _, broken = _moments(bins, tau, weights, given, groups, base, x, mu, kind)
    series = scores.new_empty(len(names) * groups * slots, dtype=kind)
    kernels.bin_sums[(_programs(bins, lists * rows), sums.turns)](
        bins.scores, bins.code, bins.starts, bins.first, tau, base, x, mu, above, series, rows,
        lists, groups, bins.room, bins.reach, **sums.how, NODES=bins.nodes, DT=TYPES[kind], BS=64,
        num_warps=2,
    )  # fmt: skip
    kernels.read_sums[(triton.cdiv(rows, 1024), len(names) * lists * groups)](
        bins.scores, bins.code, bins.order, bins.bin, bins.starts, series, *asked, broken, out,
        rows, lists, groups, bins.room, NODES=bins.nodes, DT=TYPES[kind], BLOCK=1024,
    )  # fmt: skip


def rank_mean(
    scores: Tensor, pos: Tensor, valid: Tensor | None, weight: Tensor | None, tau: Tensor,
    grad: bool, phi: str, rtol: float, method: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean of phi over the positives [L], which lists count, and the gradient where asked for."""
    lists, rows = scores.shape
    value = scores.new_empty(lists)
    defined = torch.empty(lists, dtype=torch.bool, device=scores.device)
    g = scores.new_empty(scores.shape if grad else (0,))
    if not scores.numel():
        return value.zero_(), defined.zero_(), g
    if phi not in TWINS:
        return _any_mean(scores, pos, valid, weight, tau, grad, phi, rtol, method)
    kind = computed_in(scores.dtype, rtol)
    pos, pairs = plain(pos), takes_pairs(lists, rows, method)
    # Float32 weights of any scale sum up in float64.
    if weight is not None and not (pairs and weight.dtype != torch.float64):
        weight = positive_weight(pos != 0, weight, kind)[0]
    mean = _Mean(
        scores.contiguous(), pos, None if valid is None else plain(valid),
        None if weight is None else weight.contiguous(), tau.contiguous(), phi, value,
        defined.view(torch.int8), g, kind,
    )  # fmt: skip
    if pairs:
        _dense_mean(mean)
    else:
        _binned_mean(mean, rtol)
    return value, defined, g


class _Mean(NamedTuple):
    """What a mean is of, and where it goes."""

    scores: Tensor  # [L, M]
    pos: Tensor  # [L, M]
    valid: Tensor | None  # [L, M]
    weight: Tensor | None  # [L, M]
    tau: Tensor  # [L]
    phi: str
    value: Tensor  # [L]
    defined: Tensor  # [L] int8
    g: Tensor  # [L, M] or [0]
    kind: torch.dtype  # computed in

    @property
    def grad(self) -> bool:
        """Whether the gradient is asked for."""
        return self.g.dim() > 1

    @property
    def seen(self) -> tuple[Tensor, int]:
        """The rows that count and their stride, or what stands for all."""
        return (self.scores, 0) if self.valid is None else (self.valid, self.valid.stride(0))

    @property
    def how(self) -> dict[str, Any]:
        """Of the kernels of either method that make the mean."""
        return {
            "PHI": TWINS[self.phi], "MATES": PHIS[self.phi].mates, "GRAD": self.grad,
            "PAIRED": PHIS[self.phi].needs_negative, "WEIGHTED": self.weight is not None,
        }  # fmt: skip


def _dense_mean(mean: _Mean) -> None:
    scores, pos, valid, weight, tau, phi, value, defined, g, kind = mean
    (lists, rows), grad, mates, dt = scores.shape, mean.grad, PHIS[phi].mates, TYPES[kind]
    tile = _Tile(lists, rows, kind)
    asked = pos, pos.stride(0), 0
    sources = None if valid is None else valid[:, None]
    listed = _list(scores, asked, 1, sources, tau, weight, listed=valid is not None, only=True)
    part = scores.new_empty((tile.split, 1 + grad, lists, 1 + mates, rows), dtype=kind)
    coef = scores.new_empty((lists, 3, rows) if grad else (1,), dtype=kind)
    kernels.pair_sums[tile.grid](
        scores, listed.rows, listed.counts, tau, pos, pos, pos.stride(0), 0, part, rows, lists,
        1 + mates, tile.split, FIRST="value", SECOND="slope" if grad else "", TWO=mates, REST=True,
        DT=dt, BT=tile.targets, BS=tile.sources, num_warps=4,
    )  # fmt: skip
    kernels.mean_coefficients[(lists,)](
        part, listed.rows, listed.counts, listed.bad, listed.total,
        scores if weight is None else weight, coef, value, defined, rows, lists, tile.split,
        **mean.how, DT=dt, BLOCK=256 if rows <= 512 else 1024, num_warps=4,
    )  # fmt: skip
    if grad:
        kernels.pull[(triton.cdiv(rows, 64), lists)](
            scores, *mean.seen, listed.rows, listed.place, coef, listed.counts, listed.bad,
            defined, tau, g, rows, MASKED=valid is not None, MATES=mates, DT=dt, BT=32, BM=64,
            num_warps=4,
        )  # fmt: skip


def _binned_mean(mean: _Mean, rtol: float) -> None:
    scores, pos, valid, weight, tau, _, value, defined, g, kind = mean
    (lists, rows), grad, weighted = scores.shape, mean.grad, weight is not None
    bins = _cut(scores, pos, valid, weight, tau, rtol, kind)
    slots, groups = bins.room * bins.nodes, 2 + weighted
    base, x, mu = _split(scores.new_empty((2 + groups) * slots, dtype=kind), slots, 2)
    above, total, broken = _moments(bins, tau, pos, (0, 0), groups, base, x, mu, kind, labels=True)
    parts = scores.new_empty(bins.room, dtype=torch.float64)
    node = scores.new_empty(3 * slots if grad else 1, dtype=kind)
    window = torch.empty(2 * bins.room if grad else 1, dtype=torch.int32, device=scores.device)
    programs = (_programs(bins, lists * rows),)
    sizes = {"NODES": bins.nodes, "DT": TYPES[kind]}
    kernels.bin_means[programs](
        bins.scores, bins.starts, bins.first, tau, base, x, mu, above, total, parts, node, window,
        rows, lists, bins.room, bins.reach, **mean.how, **sizes, BS=64, num_warps=2,
    )  # fmt: skip
    flags = {name: mean.how[name] for name in ("PAIRED", "WEIGHTED")}
    kernels.add_bins[(lists,)](
        parts, bins.first, total, broken, value, defined, lists, **flags, BLOCK=1024
    )
    if grad:
        kernels.bin_pulls[programs](
            bins.code, bins.starts, bins.first, tau, base, x, node, window, mu, rows, lists,
            bins.room, **sizes, BS=64, num_warps=2,
        )  # fmt: skip
        kernels.read_gradient[(triton.cdiv(rows, 1024), lists)](
            bins.scores, bins.code, bins.order, bins.bin, bins.starts, mu, node[2 * slots :],
            bins.weight, defined, broken, g, rows, bins.room, WEIGHTED=weighted, **sizes,
            BLOCK=1024,
        )  # fmt: skip


def _any_mean(
    scores: Tensor, pos: Tensor, valid: Tensor | None, weight: Tensor | None, tau: Tensor,
    grad: bool, phi: str, rtol: float, method: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`rank_mean` of a phi without a kernel of its own: sums, phi in torch, and sums back."""
    counts = pos.new_ones(pos.shape) if valid is None else valid.expand(pos.shape)
    scores = clean(scores, valid)
    sides = torch.stack([counts & ~pos, pos], 1)
    wide, some = positive_weight(pos, weight, torch.float64)
    defined = some[:, 0] & pos.any(1)
    if PHIS[phi].needs_negative:
        defined = defined & sides[:, 0].any(1)
    kinds = "value,slope" if grad else "value"
    sums = [s.double() for s in pair_sums(scores, sides, pos[:, None], tau, kinds, rtol, method)]
    near = sums[0][:, 1] + 0.5
    mates = PHIS[phi].mates
    value, b, a = PHIS[phi].at(sums[0][:, 0] + near * mates, near * mates)
    share = torch.where(defined[:, None], wide / wide.sum(1, keepdim=True), 0.0)
    mean = torch.where(defined, (share * torch.where(pos, value, 0.0)).sum(1), 0.0)
    mean = mean.to(scores.dtype)
    if not grad:
        return mean, defined, scores.new_empty(0)
    b = torch.where(pos, share * b, 0.0)
    e = torch.where(pos, share * a + b, 0.0) if mates else torch.zeros_like(b)
    own = b * sums[1][:, 0] + e * sums[1][:, 1]
    pulls = pair_sums(scores, torch.stack([b, e], 1), counts[:, None], tau, "slope", rtol, method)[
        0
    ]
    felt = torch.where(pos, pulls[:, 1], pulls[:, 0])
    g = (felt - own) / tau[:, None]
    broken = defined & mean.isnan()
    g = torch.where(broken[:, None], torch.nan, torch.where(counts, g, 0.0))
    return mean, defined, g.to(scores.dtype)


# --- parts ----------------------------------------------------------------------------------------

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class _Tile:
    """How targets and sources are shared out, from the number of lists and rows."""

    def __init__(self, lists: int, rows: int, kind: torch.dtype) -> None:
        self.targets = 16 if rows <= 16384 else 32
        self.sources = 128 if kind == torch.float32 else 64  # float64 would spill registers
        self.split = max(1, min(16, triton.cdiv(rows, 512), triton.cdiv(512, lists)))
        self.grid = triton.cdiv(rows, self.targets), self.split, lists


class _Listed(NamedTuple):
    rows: Tensor  # [2, L, M] int32, of targets and of sources
    place: Tensor  # [L, M] int32
    counts: Tensor  # [2, L] int32
    bad: Tensor  # [L] int32
    total: Tensor  # [L] float64


def plain(x: Tensor) -> Tensor:
    """Bools as bytes; rows one after the other."""
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _list(
    scores: Tensor, asked: tuple[Tensor, int, int], asked_groups: int, weights: Tensor | None,
    tau: Tensor, weight: Tensor | None, *, listed: bool, only: bool = False,
) -> _Listed:  # fmt: skip
    lists, rows = scores.shape
    ints = torch.empty(3 * lists * rows + 3 * lists, dtype=torch.int32, device=scores.device)
    numbers, place, counts = ints.split([2 * lists * rows, lists * rows, 3 * lists])
    total = scores.new_empty(lists, dtype=torch.float64)
    given = (scores, 0, 0, 1)
    if weights is not None:
        given = (weights, weights.stride(0), weights.stride(1), weights.shape[1])
    kernels.list_rows[(lists,)](
        scores, *asked, *given[:3], tau, scores if weight is None else weight, numbers, place,
        counts, counts[2 * lists :], total, rows, lists, asked_groups, given[3], LISTED=listed,
        ONLY_LISTED=only, WEIGHTED=weight is not None,
        BLOCK=min(4096, triton.next_power_of_2(rows)), num_warps=8,
    )  # fmt: skip
    return _Listed(numbers, place, counts, counts[2 * lists :], total)


def _split(whole: Tensor, size: int, count: int) -> list[Tensor]:
    """So many pieces of a size, and the rest."""
    return list(whole.split([size] * count + [whole.numel() - count * size]))


def _programs(bins: _Bins, rows: int) -> int:
    return min(bins.room, PROGRAMS * (4 if rows >= MANY_ROWS else 1))


def _most_bins(rows: int, nodes: int) -> int:
    """Bins that a list of so many rows may have.

    Rows off the crowds start one at every multiple of nodes. A crowd adds two, itself and the rows
    behind it, but its more than 2 nodes rows hide two multiples. LONGEST cuts it once more.
    """
    return rows // nodes + rows // LONGEST + 4


def _cut(
    scores: Tensor, pos: Tensor | None, valid: Tensor | None, weight: Tensor | None, tau: Tensor,
    rtol: float, kind: torch.dtype,
) -> _Bins:  # fmt: skip
    """Sort the rows and cut them into bins."""
    lists, rows = scores.shape
    nodes = 8 if kind == torch.float32 else 16
    device, crowd = scores.device, 2 * nodes
    parts = triton.cdiv(rows, 1024)
    clean = torch.empty_like(scores)
    bad = torch.empty(lists, parts, dtype=torch.int32, device=device)
    seen = (scores, 0) if valid is None else (valid, valid.stride(0))
    kernels.clean_rows[(parts, lists)](
        scores, *seen, clean, bad, rows, parts, MASKED=valid is not None, BLOCK=1024
    )
    ordered, order = clean.sort(-1, descending=True)
    del clean
    code = torch.empty(lists, rows, dtype=torch.int8, device=device)
    numbers = torch.empty(lists, rows, dtype=torch.int32, device=device)
    sorted_weight = code if weight is None else torch.empty_like(weight)
    labels = (scores, 0) if pos is None else (pos, pos.stride(0))
    kernels.mark_rows[(triton.cdiv(rows, 512), lists)](
        ordered, order, tau, *labels, *seen, scores if weight is None else weight, code,
        sorted_weight, numbers, rows, bin_width(nodes, rtol), LABELS=pos is not None,
        MASKED=valid is not None, WEIGHTED=weight is not None, CROWD=crowd, NODES=nodes,
        LONGEST=LONGEST, BLOCK=512,
    )  # fmt: skip
    numbers.view(-1).cumsum_(0)
    room = lists * _most_bins(rows, nodes)
    wide = torch.int32 if lists * rows < 1 << 31 else torch.int64
    starts = torch.empty(room + 1, dtype=wide, device=device)
    first = torch.empty(lists + 1, dtype=torch.int32, device=device)
    kernels.place_bins[(parts, lists)](numbers, starts, first, rows, lists, BLOCK=1024)
    reach = cell_width(rows, rtol)
    return _Bins(
        ordered, order, code, sorted_weight, numbers, starts, first, bad, room, nodes, reach
    )


def _moments(
    bins: _Bins, tau: Tensor, weights: Tensor, strides: tuple[int, int], groups: int,
    base: Tensor, x: Tensor, mu: Tensor, kind: torch.dtype, *, labels: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Fill base, x and mu; weight above every bin [G, BINS], totals [G, L], broken [L]."""
    lists, rows = bins.scores.shape
    mass = base.new_empty(groups * bins.room, dtype=torch.float64)
    total = base.new_empty(groups * lists, dtype=torch.float64)
    broken = torch.empty(lists, dtype=torch.int32, device=base.device)
    kernels.moments[(_programs(bins, lists * rows), groups)](
        bins.scores, bins.code, bins.order, weights, *strides, bins.weight, tau, bins.starts,
        bins.first, base, x, mu, mass, rows, lists, bins.room, LABELS=labels, NODES=bins.nodes,
        DT=TYPES[kind], BLOCK=256, num_warps=4,
    )  # fmt: skip
    parts = bins.bad.shape[1]
    kernels.add_masses[(lists, groups)](
        mass, bins.first, bins.bad, tau, total, broken, bins.room, lists, parts, BLOCK=1024
    )
    return mass, total, broken
