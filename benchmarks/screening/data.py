"""A screen in three parts that share no scaffold."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from sklearn.utils import check_random_state

from proxy_losses.integrations._rows import Rows

from ..linear_ranker_tables import Screen
from ..trainer import Part, SparseRows

SHARES = (0.6, 0.2, 0.2)  # of the molecules: training, validation, test


class Parts(NamedTuple):
    """x are `SparseRows`, y is [1, molecules]."""

    train: Part
    val: Part
    test: Part


def split(screen: Screen, seed: int) -> Parts:
    """Scaffolds in random order: the first fifth of the molecules to test, the next to choose by.

    The scaffold that goes over an edge is in the part behind it.
    """
    scaffolds, of = np.unique(screen.scaffold, return_inverse=True)
    order = check_random_state(seed).permutation(len(scaffolds))
    reached = np.bincount(of)[order].cumsum() / len(of)
    place = np.empty(len(order), dtype=int)
    place[order] = (reached > SHARES[2]).astype(int) + (reached > SHARES[2] + SHARES[1])
    return Parts(*(_part(screen.rows.take(place[of] == k)) for k in (2, 1, 0)))


def _part(rows: Rows) -> Part:
    x = SparseRows(csr_array(rows.x, dtype=np.float32))
    return Part(x, torch.from_numpy(rows.y)[None])


def made(molecules: int = 900, bits: int = 64) -> Screen:
    """Random bits, actives where several of some few are set, families of three."""
    rng = np.random.default_rng(0)
    x = rng.random((molecules, bits)) < 0.15
    y = x[:, :12].sum(1) + rng.normal(size=molecules) > 4
    return Screen(Rows(csr_array(x.astype(float)), y, None), np.arange(molecules) // 3)
