"""Kernels of metrics of a threshold, of the first positive and of gains.

One program a list, so for lists that are not long. Sums are float64, what is summed is in the type
of the scores, DT. Names and rules are those of `kernels.py`.
"""

import triton
import triton.language as tl

from .kernels import _is_finite


@triton.jit
def _sigmoid(z):
    """The sigmoid and its slope, both in full relative accuracy."""
    e = tl.exp(-tl.abs(z))
    r = 1.0 / (1.0 + e)
    return tl.where(z >= 0.0, r, e * r), e * r * r


@triton.jit
def _slope_beside(far, near):
    """The slope at a distance over that at one which is not larger; both may have vanished."""
    ratio = (1.0 + tl.exp(-near)) / (1.0 + tl.exp(-far))
    return tl.exp(tl.minimum(near - far, 0.0)) * ratio * ratio


@triton.jit
def _rows(valid_ptr, j, M, MASKED: tl.constexpr):
    """Which rows count."""
    counted = j < M
    if MASKED:
        counted = tl.load(valid_ptr + j, mask=counted, other=0) != 0
    return counted


@triton.jit
def _positives(pos_ptr, valid_ptr, j, M, MASKED: tl.constexpr):
    """Which rows count, and which of these are positives."""
    counted = _rows(valid_ptr, j, M, MASKED)
    return counted, counted & (tl.load(pos_ptr + j, mask=counted, other=0) != 0)


@triton.jit
def _weight(weight_ptr, j, p, top, WEIGHTED: tl.constexpr, DT: tl.constexpr):
    """Weights of the positives in units of the largest."""
    w = p.to(DT)
    if WEIGHTED:
        w = (tl.load(weight_ptr + j, mask=p, other=0.0).to(tl.float64) / top).to(DT)
    return w


@triton.jit
def _census(
    s_ptr, s_row, pos_ptr, valid_ptr, weight_ptr, M, MASKED: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a list: positives, negatives, largest weight, scores and weights that are not finite."""
    hits = tl.zeros((BLOCK,), tl.int32)
    others = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    heavy = tl.zeros((BLOCK,), tl.int32)
    top = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        counted, p = _positives(pos_ptr, valid_ptr, j, M, MASKED)
        s = tl.load(s_ptr + j.to(tl.int64) * s_row, mask=counted, other=0.0)
        bad |= (_is_finite(s) == 0).to(tl.int32)
        hits += p.to(tl.int32)
        others += (counted & (p == 0)).to(tl.int32)
        if WEIGHTED:
            w = tl.load(weight_ptr + j, mask=p, other=0.0).to(tl.float64)
            odd = _is_finite(w) == 0
            heavy |= odd.to(tl.int32)
            top = tl.maximum(top, tl.where(odd, 1.0, w))
    positives = tl.sum(hits)
    most = tl.max(top)
    if WEIGHTED:  # a weight that is no number counts, and shows
        positives = tl.where(most > 0.0, positives, 0)
    most = tl.where(most > 0.0, most, 1.0)
    return positives, tl.sum(others), most, tl.max(bad) > 0, tl.max(heavy) > 0


@triton.jit
def step_means(
    s_ptr, s_list, s_row, pos_ptr, pos_list, valid_ptr, valid_list, weight_ptr, weight_list,
    among_ptr, among_list, needs_ptr, needs_list, tau_ptr, tau_list, knots_ptr, cut_ptr,
    precision_ptr, mean_ptr, counts_ptr, flat_ptr, g_ptr, M, T, UPPER, LOWER,
    K: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr, AMONG: tl.constexpr,
    NEEDS: tl.constexpr, SPREAD: tl.constexpr, CUT: tl.constexpr, MOVES: tl.constexpr,
    GRAD: tl.constexpr,
    EPS: tl.constexpr, TINY: tl.constexpr, MOST: tl.constexpr, LIMIT: tl.constexpr,
    DT: tl.constexpr, KB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean [L] of the positives' soft steps above K knots of [L, T], and its gradient g [L, M].

    MOVES: "" for knots that are constants, "quantile" for those that hold the sum of steps of the
    rows in `among`, "precision" for one that holds a precision. SPREAD: tau multiplies the
    difference of two of the T. NEEDS: a list counts that has such a row. CUT: lists that are not
    cut have the mean 1.
    """
    one = tl.program_id(0).to(tl.int64)
    s_ptr += one * s_list
    pos_ptr += one * pos_list
    valid_ptr += one * valid_list
    weight_ptr += one * weight_list
    among_ptr += one * among_list
    needs_ptr += one * needs_list
    positives, _, top, bad, odd = _census(
        s_ptr, s_row, pos_ptr, valid_ptr, weight_ptr, M, MASKED, WEIGHTED, BLOCK
    )
    counts = positives > 0
    if NEEDS:
        needed = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, M, BLOCK):
            j = start + tl.arange(0, BLOCK)
            needed |= (tl.load(needs_ptr + j, mask=j < M, other=0) != 0).to(tl.int32)
        counts &= tl.max(needed) > 0
    tau = tl.load(tau_ptr + one * tau_list).to(tl.float64)
    width = tl.where(tau > 0.0, tau, float("nan")).to(DT)
    flat = counts & (counts == 0)
    if SPREAD:
        upper = tl.load(knots_ptr + one * T + UPPER)
        lower = tl.load(knots_ptr + one * T + LOWER)
        floor = tl.maximum(tl.maximum(upper, -lower), TINY) * EPS
        flat = counts & (bad == 0) & (upper - lower <= floor)
        counts &= flat == 0
        width *= tl.where(counts, upper - lower, 1.0).to(DT)
        width = tl.where(width < TINY, TINY, width).to(DT)
    shown = bad | (width != width)
    broken = shown | odd

    k = tl.arange(0, KB)
    theta = tl.load(knots_ptr + one * T + k, mask=k < K, other=0.0)
    part = tl.where(k < K, 1.0, 0.0).to(tl.float64)  # of a knot in the trapezoid
    if K > 1:
        part = part * tl.where((k == 0) | (k == K - 1), 0.5, 1.0) / (K - 1)
    steps = tl.zeros((KB, BLOCK), tl.float64)
    slopes = tl.zeros((KB, BLOCK), tl.float64)
    every = tl.zeros((KB, BLOCK), tl.float64)
    right = tl.zeros((KB, BLOCK), tl.float64)
    near = tl.zeros((KB, BLOCK), DT) + float("inf")
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        counted, p = _positives(pos_ptr, valid_ptr, j, M, MASKED)
        s = tl.load(s_ptr + j.to(tl.int64) * s_row, mask=counted, other=0.0)
        w = _weight(weight_ptr, j, p, top, WEIGHTED, DT)
        z = (s[None, :] - theta[:, None]) / width
        above, slope = _sigmoid(z)
        total += w.to(tl.float64)
        steps += tl.where(p[None, :], above * w[None, :], 0.0).to(tl.float64)
        if GRAD:
            slopes += tl.where(p[None, :], slope * w[None, :], 0.0).to(tl.float64)
        if GRAD and MOVES == "quantile":
            q = counted
            if AMONG:
                q &= tl.load(among_ptr + j, mask=counted, other=0) != 0
            far = tl.where(q[None, :], tl.minimum(tl.abs(z), LIMIT), float("inf"))
            near = tl.minimum(near, far.to(DT))
        if GRAD and MOVES == "precision":
            every += tl.where(counted[None, :], slope, 0.0).to(tl.float64)
            right += tl.where(p[None, :], slope, 0.0).to(tl.float64)
    whole = tl.maximum(tl.sum(total), 1.0)
    mean = tl.sum(tl.sum(steps, 1) * part) / whole
    mean = tl.where(broken, float("nan"), mean)
    cut = counts
    if CUT:  # where all rows are in, weights are of no matter
        cut &= (tl.load(cut_ptr + one) != 0) | shown
        mean = tl.where(cut, mean, 1.0)
    tl.store(mean_ptr + one, tl.where(counts, mean, 0.0))
    tl.store(counts_ptr + one, counts.to(tl.int8))
    tl.store(flat_ptr + one, flat.to(tl.int8))

    if GRAD:
        push = tl.sum(slopes, 1)  # of the knots on the mean
        nearest = tl.min(near, 1)
        shares = tl.zeros((KB, BLOCK), tl.float64)
        if MOVES == "quantile":
            for start in range(0, M, BLOCK):
                j = start + tl.arange(0, BLOCK)
                q = _rows(valid_ptr, j, M, MASKED)
                if AMONG:
                    q &= tl.load(among_ptr + j, mask=q, other=0) != 0
                s = tl.load(s_ptr + j.to(tl.int64) * s_row, mask=q, other=0.0)
                far = tl.minimum(tl.abs((s[None, :] - theta[:, None]) / width), LIMIT)
                each = _slope_beside(far, nearest[:, None])
                shares += tl.where(q[None, :], each, 0.0).to(tl.float64)
        norm = tl.sum(shares, 1)
        norm = tl.where(norm > 0.0, norm, 1.0)
        up = tl.sum(every, 1)
        down = tl.sum(right, 1)
        if MOVES == "precision":
            precision = tl.load(precision_ptr)
            # Where the slopes of negatives vanish, no positive has a gradient to share.
            up = tl.maximum(up - down, 2.2250738585072014e-308)
            down = tl.maximum(down, 2.2250738585072014e-308)
            x = tl.minimum((down - down * precision) / (up * precision), MOST)
            up = -1.0 / up / (x - 1.0)
            down = x / down / (x - 1.0)
        for start in range(0, M, BLOCK):
            j = start + tl.arange(0, BLOCK)
            counted, p = _positives(pos_ptr, valid_ptr, j, M, MASKED)
            s = tl.load(s_ptr + j.to(tl.int64) * s_row, mask=counted, other=0.0)
            w = _weight(weight_ptr, j, p, top, WEIGHTED, DT)
            z = (s[None, :] - theta[:, None]) / width
            slope = _sigmoid(z)[1]
            felt = (tl.where(p[None, :], slope * w[None, :], 0.0)).to(tl.float64)
            if MOVES == "quantile":
                q = counted
                if AMONG:
                    q &= tl.load(among_ptr + j, mask=counted, other=0) != 0
                far = tl.minimum(tl.abs(z), LIMIT)
                each = _slope_beside(far, nearest[:, None]).to(tl.float64)
                felt -= tl.where(q[None, :], each * (push / norm)[:, None], 0.0)
            if MOVES == "precision":
                each = slope.to(tl.float64) * tl.where(p[None, :], down[:, None], up[:, None])
                felt -= each * push[:, None]
            g = tl.sum(felt * part[:, None], 0) / whole / width.to(tl.float64)
            g = tl.where(cut & counted, tl.where(broken, float("nan"), g), 0.0)
            tl.store(g_ptr + one * M + j, g.to(DT), mask=j < M)


@triton.jit
def precision_places(
    s_ptr, order_ptr, pos_ptr, pos_list, valid_ptr, valid_list, precision_ptr, theta_ptr, cut_ptr,
    M, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Thresholds [L] below the last place that reaches a precision, and whether a row is below.

    s [L, M] is in order, the largest first, and rows that do not count last.
    """
    one = tl.program_id(0).to(tl.int64)
    s_ptr += one * M
    order_ptr += one * M
    pos_ptr += one * pos_list
    valid_ptr += one * valid_list
    precision = tl.load(precision_ptr)
    number = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        number += _rows(valid_ptr, j, M, MASKED).to(tl.int32)
    count = tl.sum(number)
    hits = 0
    last = 0
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        m = j < count
        row = tl.load(order_ptr + j, mask=m, other=0)
        p = (tl.load(pos_ptr + row, mask=m, other=0) != 0).to(tl.int32)
        found = hits + tl.cumsum(p, 0)
        s = tl.load(s_ptr + j, mask=m, other=0.0)
        below = tl.load(s_ptr + j + 1, mask=m & (j + 1 < M), other=float("-inf"))
        share = found.to(tl.float64) / (j + 1).to(tl.float64)
        last = tl.maximum(last, tl.max(tl.where(m & (s > below) & (share >= precision), j + 1, 0)))
        hits += tl.sum(p)
    upper = tl.load(s_ptr + tl.maximum(last - 1, 0))
    cut = last < count
    lower = tl.load(s_ptr + tl.where(cut, last, 0))
    middle = tl.where(last > 0, 0.5 * upper + 0.5 * lower, upper)
    tl.store(theta_ptr + one, tl.where(cut, middle, 0.0))
    tl.store(cut_ptr + one, cut.to(tl.int8))


@triton.jit
def first_ranks(
    s_ptr, s_list, s_row, pos_ptr, pos_list, valid_ptr, valid_list, weight_ptr, weight_list,
    tau_ptr, tau_list, value_ptr, counts_ptr, g_ptr, M, MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr, GRAD: tl.constexpr, DT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reciprocal [L] of the soft rank of the first positive, and its gradient g [L, M]."""
    one = tl.program_id(0).to(tl.int64)
    s_ptr += one * s_list
    pos_ptr += one * pos_list
    valid_ptr += one * valid_list
    weight_ptr += one * weight_list
    positives, negatives, heaviest, bad, odd = _census(
        s_ptr, s_row, pos_ptr, valid_ptr, weight_ptr, M, MASKED, WEIGHTED, BLOCK
    )
    counts = (positives > 0) & (negatives > 0)
    tau = tl.load(tau_ptr + one * tau_list).to(tl.float64)
    width = tl.where(tau > 0.0, tau, float("nan")).to(DT)
    broken = bad | odd | (width != width)

    largest = tl.zeros((BLOCK,), DT) - float("inf")
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        counted, p = _positives(pos_ptr, valid_ptr, j, M, MASKED)
        p &= _weight(weight_ptr, j, p, heaviest, WEIGHTED, DT) > 0.0
        s = tl.load(s_ptr + j.to(tl.int64) * s_row, mask=p, other=0.0)
        largest = tl.maximum(largest, tl.where(p, s, float("-inf")).to(DT))
    top = tl.where(counts, tl.max(largest), 0.0)
    mass = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        counted, p = _positives(pos_ptr, valid_ptr, j, M, MASKED)
        w = _weight(weight_ptr, j, p, heaviest, WEIGHTED, DT)
        s = tl.load(s_ptr + j.to(tl.int64) * s_row, mask=p, other=0.0)
        each = tl.where(w > 0.0, w * tl.exp((s - top) / width), 0.0)
        mass += each.to(tl.float64)
        total += w.to(tl.float64)
        square += (w * w).to(tl.float64)
    hit = tl.sum(mass)
    hit = tl.where(hit > 0.0, hit, 1.0)
    inside = hit
    if WEIGHTED:
        squares = tl.sum(square)
        inside = hit * tl.sum(total) / tl.where(squares > 0.0, squares, 1.0)
    shift = tl.log(tl.where(counts, inside, 1.0)).to(DT)  # of s+ from the top, in units of tau
    ahead = tl.zeros((BLOCK,), tl.float64)
    slopes = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        counted, p = _positives(pos_ptr, valid_ptr, j, M, MASKED)
        n = counted & (p == 0)
        s = tl.load(s_ptr + j.to(tl.int64) * s_row, mask=n, other=0.0)
        above, slope = _sigmoid((s - top) / width - shift)
        ahead += tl.where(n, above, 0.0).to(tl.float64)
        slopes += tl.where(n, slope, 0.0).to(tl.float64)
    rank = 1.0 + tl.sum(ahead)
    value = tl.where(broken, float("nan"), 1.0 / rank)
    tl.store(value_ptr + one, tl.where(counts, value, 0.0))
    tl.store(counts_ptr + one, counts.to(tl.int8))

    if GRAD:
        push = tl.sum(slopes) / hit
        for start in range(0, M, BLOCK):
            j = start + tl.arange(0, BLOCK)
            counted, p = _positives(pos_ptr, valid_ptr, j, M, MASKED)
            w = _weight(weight_ptr, j, p, heaviest, WEIGHTED, DT)
            s = tl.load(s_ptr + j.to(tl.int64) * s_row, mask=counted, other=0.0)
            away = (s - top) / width
            above, slope = _sigmoid(away - shift)
            share = tl.where(w > 0.0, w * tl.exp(tl.where(p, away, 0.0)), 0.0)
            felt = tl.where(p, -push * share.to(tl.float64), slope.to(tl.float64))
            g = -felt / (rank * rank) / width.to(tl.float64)
            g = tl.where(counts & counted, tl.where(broken, float("nan"), g), 0.0)
            tl.store(g_ptr + one * M + j, g.to(DT), mask=j < M)


@triton.jit
def divide_gains(
    pos_ptr, pos_list, valid_ptr, valid_list, gains_ptr, gains_list, weight_ptr, weight_list,
    gain_ptr, label_ptr, some_ptr, total_ptr, M, MASKED: tl.constexpr, GRADED: tl.constexpr,
    WEIGHTED: tl.constexpr, LEAST: tl.constexpr, DT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gains [L, M] in units of the largest, where they are not 0, whether a list counts, their sum.

    A gain below LEAST is none, and a list that has one shows it.
    """
    one = tl.program_id(0).to(tl.int64)
    pos_ptr += one * pos_list
    valid_ptr += one * valid_list
    gains_ptr += one * gains_list
    weight_ptr += one * weight_list
    heavy = tl.zeros((BLOCK,), tl.float64)
    if WEIGHTED:
        for start in range(0, M, BLOCK):
            j = start + tl.arange(0, BLOCK)
            counted, p = _positives(pos_ptr, valid_ptr, j, M, MASKED)
            w = tl.load(weight_ptr + j, mask=p, other=0.0).to(tl.float64)
            heavy = tl.where((w == w) & (heavy == heavy), tl.maximum(heavy, w), float("nan"))
    odd = tl.max((heavy != heavy).to(tl.int32)) > 0
    heaviest = tl.where(odd, float("nan"), tl.max(tl.where(heavy == heavy, heavy, 0.0)))

    largest = tl.zeros((BLOCK,), tl.float64) - float("inf")
    smallest = tl.zeros((BLOCK,), tl.float64) + float("inf")
    none = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        counted = _rows(valid_ptr, j, M, MASKED)
        gain = _gain(pos_ptr, gains_ptr, weight_ptr, j, counted, heaviest, GRADED, WEIGHTED, LEAST)
        wrong = gain != gain
        none |= wrong.to(tl.int32)
        gain = tl.where(wrong, 0.0, gain)
        largest = tl.maximum(largest, tl.where(j < M, gain, float("-inf")))
        smallest = tl.minimum(smallest, tl.where(counted, gain, float("inf")))
    high = tl.max(largest)
    low = tl.min(smallest)
    broken = tl.max(none) > 0
    # Gains that are all infinite are not all the same.
    some = broken | ((high - low <= 0.0) == 0)
    high = tl.where(broken, float("nan"), tl.where(some, high, 1.0))
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        counted = _rows(valid_ptr, j, M, MASKED)
        gain = _gain(pos_ptr, gains_ptr, weight_ptr, j, counted, heaviest, GRADED, WEIGHTED, LEAST)
        share = tl.where(some, gain / high, 0.0).to(DT)
        share = tl.where(j < M, share, 0.0)
        total += share.to(tl.float64)
        tl.store(gain_ptr + one * M + j, share, mask=j < M)
        tl.store(label_ptr + one * M + j, (share != 0.0).to(tl.int8), mask=j < M)
    tl.store(some_ptr + one, some.to(tl.int8))
    tl.store(total_ptr + one, tl.sum(total))


@triton.jit
def _gain(
    pos_ptr, gains_ptr, weight_ptr, j, counted, heaviest, GRADED: tl.constexpr,
    WEIGHTED: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Float64 gains, by weight, 0 in rows that do not count, NaN where there is none."""
    p = counted & (tl.load(pos_ptr + j, mask=counted, other=0) != 0)
    gain = p.to(tl.float64)
    if GRADED:
        gain = tl.load(gains_ptr + j, mask=p, other=0).to(tl.float64)
        gain = tl.where(gain <= LEAST, float("nan"), gain)
    if WEIGHTED:
        w = tl.load(weight_ptr + j, mask=p, other=0.0).to(tl.float64)
        gain *= tl.where(heaviest <= 0.0, 0.0, w / tl.where(heaviest <= 0.0, 1.0, heaviest))
    return gain


@triton.jit
def ideal_shares(gain_ptr, total_ptr, share_ptr, M, BLOCK: tl.constexpr):
    """The sum of gains over their discounted sum in their own order, at most the sum itself."""
    one = tl.program_id(0).to(tl.int64)
    ideal = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        gain = tl.load(gain_ptr + one * M + j, mask=j < M, other=0.0).to(tl.float64)
        ideal += gain * (0.6931471805599453 / tl.log((j + 2).to(tl.float64)))
    tl.store(share_ptr + one, tl.load(total_ptr + one) / tl.maximum(tl.sum(ideal), 1.0))
