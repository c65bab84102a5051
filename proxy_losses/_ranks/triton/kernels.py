"""Kernels of the sums over pairs and of means of soft ranks.

Nothing is read by the host: sizes of buffers and grids follow from shapes, and every number that
depends on the data stays on the device. No atomics: the same input gives the same bits. Scores are
subtracted before they are scaled. Addresses are int64.

Names: L lists of M rows, G groups of weights. KIND of a kernel is "value", "slope", "stretch",
"entropy" or "" for none, as in `dense.kernels`. DT is the type that is computed in.
"""

import triton
import triton.language as tl

# A key beyond this has lost digits; its bin then holds equal scores only.
EXACT = tl.constexpr(2.0**53)
VALID = tl.constexpr(1)  # bits of a row's code
POSITIVE = tl.constexpr(2)
CROWDED = tl.constexpr(4)


@triton.jit
def _wide(n):
    """An int64 of a size, which may be a constant of the compiler."""
    return tl.zeros((), tl.int64) + n


@triton.jit
def _tau(tau_ptr, one):
    """Float64 temperature of a list; 1 where it is none."""
    tau = tl.load(tau_ptr + one)
    return tl.where(tau > 0.0, tau, 1.0)


@triton.jit
def _unit(tau_ptr, one, DT: tl.constexpr):
    """1 / tau, finite."""
    return tl.minimum(1.0 / _tau(tau_ptr, one), 3.0e38).to(DT)


@triton.jit
def _kernel(z, KIND: tl.constexpr):
    """A kernel at z; all of them keep their relative accuracy where sigmoid is near 0 or 1."""
    e = tl.exp(-tl.abs(z))
    r = 1.0 / (1.0 + e)
    if KIND == "value":
        k = tl.where(z >= 0.0, r, e * r)
    elif KIND == "slope":
        k = e * r * r
    elif KIND == "entropy":
        k = tl.where(e < 1e-5, e - 0.5 * e * e, tl.log(1.0 + e))
        k += tl.where(e > 0.0, tl.abs(z), 0.0) * (e * r)
    else:
        k = tl.where(e > 0.0, z, 0.0) * (e * r * r)
    return k


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


# --- exact pairs ----------------------------------------------------------------------------------


@triton.jit
def list_rows(
    s_ptr, at_ptr, at_list, at_group, w_ptr, w_list, w_group, tau_ptr, weight_ptr,
    rows_ptr, place_ptr, n_ptr, bad_ptr, total_ptr, M, L, A, G,
    LISTED: tl.constexpr, ONLY_LISTED: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the targets and the sources of any group, one program a list.

    rows [2, L, M] and n [2, L]: row numbers of targets and sources. place [L, M]: the place of a
    row among the targets, or -1. bad [L]: rows that are not finite, of the sources alone if
    ONLY_LISTED, and a tau that is none. total [L] float64: sum of weight [L, M] at the targets.
    LISTED: sources are where w [L, G, M] is not 0; otherwise all rows are.
    """
    one = tl.program_id(0).to(tl.int64)
    at_ptr += one * at_list
    w_ptr += one * w_list
    base = one * M
    targets = 0
    sources = 0
    bad = (tl.load(tau_ptr + one) > 0.0).to(tl.int32) ^ 1
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        m = j < M
        hit = tl.zeros((BLOCK,), tl.int32)
        for a in range(A):
            hit |= (tl.load(at_ptr + a * at_group + j, mask=m, other=0) != 0).to(tl.int32)
        gives = m.to(tl.int32)
        if LISTED:
            gives = tl.zeros((BLOCK,), tl.int32)
            for g in range(G):
                gives |= (tl.load(w_ptr + g * w_group + j, mask=m, other=0) != 0).to(tl.int32)
        unsound = m & (_is_finite(tl.load(s_ptr + base + j, mask=m, other=0.0)) == 0)
        if ONLY_LISTED:
            unsound = unsound & (gives != 0)
        bad += tl.sum(unsound.to(tl.int32))
        first = targets + tl.cumsum(hit, 0) - 1
        tl.store(rows_ptr + base + first, j, mask=hit != 0)
        tl.store(place_ptr + base + j, tl.where(hit != 0, first, -1), mask=m)
        second = sources + tl.cumsum(gives, 0) - 1
        tl.store(rows_ptr + L * M + base + second, j, mask=gives != 0)
        targets += tl.sum(hit)
        sources += tl.sum(gives)
        if WEIGHTED:
            total += tl.load(weight_ptr + base + j, mask=hit != 0, other=0.0).to(tl.float64)
    tl.store(n_ptr + one, targets)
    tl.store(n_ptr + L + one, sources)
    tl.store(bad_ptr + one, bad)
    if WEIGHTED:
        tl.store(total_ptr + one, tl.sum(total))
    else:
        tl.store(total_ptr + one, targets.to(tl.float64))


@triton.jit
def pair_sums(
    s_ptr, rows_ptr, n_ptr, tau_ptr, w0_ptr, w1_ptr, w_list, w_group, part_ptr, M, L, G, SPLIT,
    FIRST: tl.constexpr, SECOND: tl.constexpr, TWO: tl.constexpr, REST: tl.constexpr,
    DT: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Parts [SPLIT, kinds, L, G, M] of the sums at the targets listed, over the sources listed.

    A program takes two groups if TWO. REST: their weights are 1 - w1 and w1.
    """
    split = tl.program_id(1)
    stride = 2 if TWO else 1
    turns = (G + stride - 1) // stride
    one = (tl.program_id(2) // turns).to(tl.int64)
    g = (tl.program_id(2) % turns) * stride
    base = one * M
    targets = tl.load(n_ptr + one)
    sources = tl.load(n_ptr + L + one)
    first = tl.program_id(0) * BT
    if first < targets:
        i = first + tl.arange(0, BT)
        row = tl.load(rows_ptr + base + i, mask=i < targets, other=0)
        y = tl.load(s_ptr + base + row, mask=i < targets, other=0.0).to(DT)
        unit = _unit(tau_ptr, one, DT)
        two = g + 1 < G
        w0_ptr += one * w_list + g * w_group
        w1_ptr += one * w_list + g * w_group
        a0 = tl.zeros((BT, BS), DT)
        a1 = tl.zeros((BT, BS), DT)
        b0 = tl.zeros((BT, BS), DT)
        b1 = tl.zeros((BT, BS), DT)
        for start in range(split * BS, sources, SPLIT * BS):
            k = start + tl.arange(0, BS)
            m = k < sources
            j = tl.load(rows_ptr + L * M + base + k, mask=m, other=0)
            x = tl.load(s_ptr + base + j, mask=m, other=0.0).to(DT)
            z = (x[None, :] - y[:, None]) * unit
            if REST:
                w1 = tl.load(w1_ptr + j, mask=m, other=0).to(DT)
                w0 = m.to(DT) - w1
            else:
                w0 = tl.load(w0_ptr + j, mask=m, other=0).to(DT)
                if TWO:
                    w1 = tl.load(w1_ptr + j, mask=k < tl.where(two, sources, 0), other=0).to(DT)
                else:
                    w1 = w0
            k0 = _kernel(z, FIRST)
            a0 += k0 * w0[None, :]
            if TWO:
                a1 += k0 * w1[None, :]
            if SECOND != "":
                k1 = _kernel(z, SECOND)
                b0 += k1 * w0[None, :]
                if TWO:
                    b1 += k1 * w1[None, :]
        kinds = 2 if SECOND != "" else 1
        step = _wide(L) * G * M
        out = part_ptr + split * kinds * step + (one * G + g) * M + i
        tl.store(out, tl.sum(a0, 1), mask=i < targets)
        if TWO:
            tl.store(out + M, tl.sum(a1, 1), mask=i < tl.where(two, targets, 0))
        if SECOND != "":
            tl.store(out + step, tl.sum(b0, 1), mask=i < targets)
            if TWO:
                tl.store(out + step + M, tl.sum(b1, 1), mask=i < tl.where(two, targets, 0))


@triton.jit
def add_parts(
    part_ptr, place_ptr, at_ptr, at_list, at_group, bad_ptr, out_ptr, M, L, G, SPLIT, KINDS,
    DT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums out [kinds, L, G, M] from their parts: 0 off the targets, NaN in lists that are bad."""
    which = tl.program_id(1).to(tl.int64)  # kind, list, group
    one = (which // G) % L
    g = which % G
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = j < M
    place = tl.load(place_ptr + one * M + j, mask=m, other=-1)
    asked = tl.load(at_ptr + one * at_list + g * at_group + j, mask=m, other=0) != 0
    total = tl.zeros((BLOCK,), DT)
    step = KINDS * _wide(L) * G * M
    for split in range(SPLIT):
        at = part_ptr + split * step + which * M + place
        total += tl.load(at, mask=place >= 0, other=0.0)
    total = tl.where(tl.load(bad_ptr + one) > 0, float("nan"), total)
    tl.store(out_ptr + which * M + j, tl.where(asked, total, 0.0), mask=m)


@triton.jit
def _coefficients(negatives, positives, far, near, PHI: tl.constexpr, MATES: tl.constexpr):
    """phi, its pull on negatives and on positives, and the pull on the positive itself.

    negatives, positives: sums of the kernel; far, near: sums of its slope.
    """
    rank_pos = 0.0 * negatives
    if MATES:
        rank_pos = positives + 0.5  # sigmoid(0) of its own is in the sum
    value, b, a = PHI(negatives + rank_pos, rank_pos)
    e = 0.0 * b
    if MATES:
        e = a + b
    return value, b, e, b * far + e * near


@triton.jit
def mean_coefficients(
    part_ptr, rows_ptr, n_ptr, bad_ptr, total_ptr, weight_ptr, coef_ptr, mean_ptr, defined_ptr,
    M, L, SPLIT, PHI: tl.constexpr, MATES: tl.constexpr, PAIRED: tl.constexpr,
    WEIGHTED: tl.constexpr, GRAD: tl.constexpr, DT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the parts to the mean [L], which lists count, and coef [L, 3, M] of the gradient."""
    one = tl.program_id(0).to(tl.int64)
    count = tl.load(n_ptr + one)
    bad = tl.load(bad_ptr + one)
    total = tl.load(total_ptr + one)
    # A NaN among the weights shows.
    good = (count > 0) & ((total <= 0.0) == 0)
    if PAIRED:
        good &= count < tl.load(n_ptr + L + one)
    share = tl.where(good, 1.0 / tl.where(good, total, 1.0), 0.0)
    groups = 2 if MATES else 1
    kinds = 2 if GRAD else 1
    step = _wide(L) * groups * M
    mean = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        m = i < count
        n0 = tl.zeros((BLOCK,), DT)
        n1 = tl.zeros((BLOCK,), DT)
        d0 = tl.zeros((BLOCK,), DT)
        d1 = tl.zeros((BLOCK,), DT)
        for split in range(SPLIT):
            at = part_ptr + split * kinds * step + one * groups * M + i
            n0 += tl.load(at, mask=m, other=0.0)
            if MATES:
                n1 += tl.load(at + M, mask=m, other=0.0)
            if GRAD:
                d0 += tl.load(at + step, mask=m, other=0.0)
                if MATES:
                    d1 += tl.load(at + step + M, mask=m, other=0.0)
        value, b, e, own = _coefficients(n0, n1, d0, d1, PHI, MATES)
        part = share + tl.zeros((BLOCK,), tl.float64)
        if WEIGHTED:
            row = tl.load(rows_ptr + one * M + i, mask=m, other=0)
            part *= tl.load(weight_ptr + one * M + row, mask=m, other=0.0).to(tl.float64)
        mean += tl.where(m, part * value.to(tl.float64), 0.0)
        if GRAD:
            narrow = part.to(DT)
            at = coef_ptr + one * 3 * M + i
            tl.store(at, b * narrow, mask=m)
            tl.store(at + M, e * narrow, mask=m)
            tl.store(at + 2 * M, own * narrow, mask=m)
    found = tl.where(good, tl.sum(mean), 0.0)
    tl.store(mean_ptr + one, tl.where(good & (bad > 0), float("nan"), found))
    tl.store(defined_ptr + one, good.to(tl.int8))


@triton.jit
def pull(
    s_ptr, valid_ptr, valid_list, rows_ptr, place_ptr, coef_ptr, n_ptr, bad_ptr, defined_ptr,
    tau_ptr, g_ptr, M, MASKED: tl.constexpr, MATES: tl.constexpr, DT: tl.constexpr,
    BT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The gradient [L, M] of the mean: what every row feels of the positives."""
    one = tl.program_id(1).to(tl.int64)
    base = one * M
    count = tl.load(n_ptr + one)
    good = tl.load(defined_ptr + one) != 0
    count = tl.where(good, count, 0)
    unit = _unit(tau_ptr, one, DT)
    j = tl.program_id(0) * BM + tl.arange(0, BM)
    m = j < M
    counts = m
    if MASKED:
        counts = tl.load(valid_ptr + one * valid_list + j, mask=m, other=0) != 0
    x = tl.load(s_ptr + base + j, mask=counts, other=0.0).to(DT)
    place = tl.load(place_ptr + base + j, mask=counts, other=-1)
    positive = place >= 0
    acc = tl.zeros((BT, BM), DT)
    for start in range(0, count, BT):
        i = start + tl.arange(0, BT)
        mi = i < count
        row = tl.load(rows_ptr + base + i, mask=mi, other=0)
        y = tl.load(s_ptr + base + row, mask=mi, other=0.0).to(DT)
        b = tl.load(coef_ptr + 3 * base + i, mask=mi, other=0.0)
        k = _kernel((x[None, :] - y[:, None]) * unit, "slope")
        if MATES:
            e = tl.load(coef_ptr + 3 * base + M + i, mask=mi, other=0.0)
            acc += k * tl.where(positive[None, :], e[:, None], b[:, None])
        else:
            acc += k * tl.where(positive[None, :], 0.0, b[:, None])
    own = tl.load(coef_ptr + 3 * base + 2 * M + place, mask=positive, other=0.0)
    g = (tl.where(counts, tl.sum(acc, 0), 0.0) - own) * unit
    g = tl.where(good, tl.where(tl.load(bad_ptr + one) > 0, float("nan"), g), 0.0)
    tl.store(g_ptr + base + j, g, mask=m)


# --- bins -----------------------------------------------------------------------------------------
# Rows are sorted, the largest first. Those of one stretch of the axis, H tau long, are a bin. A bin
# of more rows than CROWD is crowded and summed up in NODES Chebyshev points; other rows are points
# themselves, NODES to a bin. Bins are numbered through all lists.


@triton.jit
def clean_rows(
    s_ptr, valid_ptr, valid_list, clean_ptr, bad_ptr, M, PARTS, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores with 0 where they do not count or are not finite, and how many are not: [L, PARTS]."""
    one = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = j < M
    counts = m
    if MASKED:
        counts = tl.load(valid_ptr + one * valid_list + j, mask=m, other=0) != 0
    s = tl.load(s_ptr + one * M + j, mask=counts, other=0.0)
    sound = _is_finite(s)
    tl.store(clean_ptr + one * M + j, tl.where(sound, s, 0.0), mask=m)
    tl.store(bad_ptr + one * PARTS + tl.program_id(0), tl.sum((sound == 0).to(tl.int32)))


@triton.jit
def mark_rows(
    s_ptr, order_ptr, tau_ptr, pos_ptr, pos_list, valid_ptr, valid_list, weight_ptr,
    code_ptr, sorted_weight_ptr, start_ptr, M, H,
    LABELS: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr, CROWD: tl.constexpr,
    NODES: tl.constexpr, LONGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of every sorted row a code (valid, positive, crowded), and whether a bin starts with it."""
    one = tl.program_id(1).to(tl.int64)
    base = one * M
    s_ptr += base
    per_bin = 1.0 / (_tau(tau_ptr, one) * H)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = j < M
    s = tl.load(s_ptr + j, mask=m, other=0.0)
    last = tl.load(s_ptr + j - 1, mask=m & (j > 0), other=0.0)
    key = tl.floor(s.to(tl.float64) * per_bin)
    last_key = tl.floor(last.to(tl.float64) * per_bin)
    exact = tl.abs(key) < EXACT
    last_exact = tl.abs(last_key) < EXACT
    mine = tl.zeros((BLOCK,), tl.int32)  # other rows of the same stretch, of this row
    lasts = tl.zeros((BLOCK,), tl.int32)  # and of the one before
    for d in range(-CROWD - 1, CROWD + 1):
        q = j + d
        inside = m & (q >= 0) & (q < M)
        x = tl.load(s_ptr + q, mask=inside, other=0.0)
        its = tl.floor(x.to(tl.float64) * per_bin)
        same = inside & (its == key) & (exact | (x == s))
        mine += (same & (d != 0) & (d >= -CROWD)).to(tl.int32)
        same = inside & (its == last_key) & (last_exact | (x == last))
        lasts += (same & (d != -1) & (d < CROWD)).to(tl.int32)
    crowded = mine >= CROWD
    after_crowd = (j > 0) & (lasts >= CROWD)
    new = (key != last_key) | ((exact == 0) & (s != last))
    within = tl.where(crowded, new | (j % LONGEST == 0), j % NODES == 0)
    start = (j == 0) | (crowded != after_crowd) | within
    tl.store(start_ptr + base + j, start.to(tl.int32), mask=m)
    code = tl.where(crowded, CROWDED, 0)
    if LABELS:
        row = tl.load(order_ptr + base + j, mask=m, other=0)
        if MASKED:
            valid = tl.load(valid_ptr + one * valid_list + row, mask=m, other=0) != 0
            code += tl.where(valid, VALID, 0)
        else:
            code += VALID
        code += tl.where(tl.load(pos_ptr + one * pos_list + row, mask=m, other=0) != 0, POSITIVE, 0)
        if WEIGHTED:
            w = tl.load(weight_ptr + base + row, mask=m, other=0.0)
            tl.store(sorted_weight_ptr + base + j, w, mask=m)
    tl.store(code_ptr + base + j, code.to(tl.int8), mask=m)


@triton.jit
def place_bins(bin_ptr, starts_ptr, first_ptr, M, L, BLOCK: tl.constexpr):
    """The sorted row, of all L M, at which every bin starts, and the first bin of every list.

    bin [L, M]: bins that start up to and with a row.
    """
    one = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = j < M
    r = one * M + j
    b = tl.load(bin_ptr + r, mask=m, other=0)
    before = tl.load(bin_ptr + r - 1, mask=m & (r > 0), other=0)
    tl.store(starts_ptr + b - 1, r, mask=m & (b != before))
    tl.store(first_ptr + one + 0 * j, b - 1, mask=m & (j == 0))
    end = m & (r == _wide(L) * M - 1)
    tl.store(starts_ptr + b, r + 1, mask=end)
    tl.store(first_ptr + one + 1 + 0 * j, b, mask=end)


@triton.jit
def _points(NODES: tl.constexpr, DT: tl.constexpr):
    """Chebyshev points x_i, and C [i, k] = T_k(x_i) (2 - [k = 0]) / NODES."""
    i = tl.arange(0, NODES)
    angle = 3.141592653589793 * (i.to(tl.float64) + 0.5) / NODES
    turn = angle[:, None] * i.to(tl.float64)[None, :]
    both = tl.where(i == 0, 1.0 / NODES, 2.0 / NODES)[None, :]
    return tl.cos(angle).to(DT), (tl.cos(turn) * both).to(DT)


@triton.jit
def moments(
    s_ptr, code_ptr, order_ptr, w_ptr, w_list, w_group, sorted_weight_ptr, tau_ptr, starts_ptr,
    first_ptr, base_ptr, x_ptr, mu_ptr, mass_ptr, M, L, BINS, LABELS: tl.constexpr,
    NODES: tl.constexpr, DT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Points of every bin and, of the group of this program, their moments and the bin's weight.

    A point lies at base (a score) + x (in tau): one number would lose digits far from 0. LABELS:
    group 0 are negatives, 1 positives, 2 positives by weight; otherwise w [L, G, M] has them.
    """
    group = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, NODES)
    nodes, basis = _points(NODES, DT)
    slots = _wide(BINS) * NODES
    for b in range(tl.program_id(0), tl.load(first_ptr + L), tl.num_programs(0)):
        begin = tl.load(starts_ptr + b).to(tl.int64)
        end = tl.load(starts_ptr + b + 1).to(tl.int64)
        one = begin // M
        slot = _wide(b) * NODES + k
        high = tl.load(s_ptr + begin).to(DT)
        crowded = (tl.load(code_ptr + begin) & CROWDED) != 0
        half = high - high
        if crowded:
            half = 0.5 * (high - tl.load(s_ptr + end - 1).to(DT))
        scale = tl.where(half > 0.0, 1.0 / tl.where(half > 0.0, half, 1.0), 0.0)
        if crowded:
            acc = tl.zeros((NODES, BLOCK), DT)
            for start in range(begin, end, BLOCK):
                j = start + tl.arange(0, BLOCK)
                m = j < end
                s = tl.load(s_ptr + j, mask=m, other=0.0).to(DT)
                t = tl.minimum(tl.maximum(1.0 - (high - s) * scale, -1.0), 1.0)
                w = _row_weight(
                    code_ptr, order_ptr, w_ptr + one * w_list + group * w_group, sorted_weight_ptr,
                    group, j, m, LABELS, DT,
                )  # fmt: skip
                t0 = w
                t1 = t * w
                for kk in tl.static_range(NODES):
                    acc += tl.where((k == kk)[:, None], t0[None, :], 0.0)
                    t2 = 2.0 * t * t1 - t0
                    t0 = t1
                    t1 = t2
            series = tl.sum(acc, 1)
            mass = tl.sum(tl.where(k == 0, series, 0.0))
            mu = tl.sum(basis * series[None, :], 1)
            base = high + 0.0 * nodes
            x = (half * _unit(tau_ptr, one, DT)) * (nodes - 1.0)
        else:
            j = begin + k
            m = j < end
            s = tl.load(s_ptr + j, mask=m, other=0.0).to(DT)
            mu = _row_weight(
                code_ptr, order_ptr, w_ptr + one * w_list + group * w_group, sorted_weight_ptr,
                group, j, m, LABELS, DT,
            )  # fmt: skip
            mass = tl.sum(mu)
            base = tl.where(m, s, high)
            x = 0.0 * s
        if group == 0:
            tl.store(base_ptr + slot, base)
            tl.store(x_ptr + slot, x)
        tl.store(mu_ptr + group * slots + slot, mu)
        tl.store(mass_ptr + group * BINS + b, mass.to(tl.float64))


@triton.jit
def _row_weight(
    code_ptr, order_ptr, w_ptr, sorted_weight_ptr, group, j, m, LABELS: tl.constexpr,
    DT: tl.constexpr,
):  # fmt: skip
    if LABELS:
        code = tl.load(code_ptr + j, mask=m, other=0)
        positive = (code & POSITIVE) != 0
        negative = ((code & VALID) != 0) & (positive == 0)
        w = tl.where(group == 0, negative.to(DT), positive.to(DT))
        if group == 2:
            w = tl.load(sorted_weight_ptr + j, mask=m & positive, other=0.0).to(DT)
    else:
        row = tl.load(order_ptr + j, mask=m, other=0)
        w = tl.load(w_ptr + row, mask=m, other=0).to(DT)
    return w


@triton.jit
def add_masses(
    mass_ptr, first_ptr, bad_ptr, tau_ptr, total_ptr, broken_ptr, BINS, L, PARTS,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Weight above every bin of its list, in place; total [G, L]; broken [L]."""
    one = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    end = tl.load(first_ptr + one + 1)
    above = tl.zeros((), tl.float64)
    for start in range(tl.load(first_ptr + one), end, BLOCK):
        b = start + tl.arange(0, BLOCK)
        m = b < end
        mass = tl.load(mass_ptr + group * BINS + b, mask=m, other=0.0)
        tl.store(mass_ptr + group * BINS + b, above + tl.cumsum(mass, 0) - mass, mask=m)
        above += tl.sum(mass)
    tl.store(total_ptr + group * L + one, above)
    if group == 0:
        bad = (tl.load(tau_ptr + one) > 0.0).to(tl.int32) ^ 1
        for start in range(0, PARTS, BLOCK):
            p = start + tl.arange(0, BLOCK)
            bad += tl.sum(tl.load(bad_ptr + one.to(tl.int64) * PARTS + p, mask=p < PARTS, other=0))
        tl.store(broken_ptr + one, bad)


@triton.jit
def _bin_above(s_ptr, starts_ptr, begin, end, level, LOWEST: tl.constexpr):
    """First bin in [begin, end] whose lowest (else: highest) score is not above the level."""
    while begin < end:
        middle = (begin + end) // 2
        row = tl.load(starts_ptr + middle)
        if LOWEST:
            row = tl.load(starts_ptr + middle + 1) - 1
        above = tl.load(s_ptr + row).to(tl.float64) > level
        begin = tl.where(above, middle + 1, begin)
        end = tl.where(above, end, middle)
    return begin


@triton.jit
def _window(s_ptr, starts_ptr, first_ptr, tau_ptr, b, M, K):
    """List of a bin, and the bins [left, right) with scores within K tau of its own."""
    begin = tl.load(starts_ptr + b)
    high = tl.load(s_ptr + begin).to(tl.float64)
    low = tl.load(s_ptr + tl.load(starts_ptr + b + 1) - 1).to(tl.float64)
    one = begin.to(tl.int64) // M
    reach = K * _tau(tau_ptr, one)
    end = tl.load(first_ptr + one + 1)
    left = _bin_above(s_ptr, starts_ptr, tl.load(first_ptr + one), b, high + reach, True)
    right = _bin_above(s_ptr, starts_ptr, b, end, low - reach, False)
    return one, left, right


@triton.jit
def _near(
    base_ptr, x_ptr, mu0_ptr, mu1_ptr, slot, left, right, unit, FIRST: tl.constexpr,
    SECOND: tl.constexpr, TWO: tl.constexpr, NODES: tl.constexpr, DT: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """Sums of up to two kernels and two groups at the points of a bin, over a window of bins."""
    base = tl.load(base_ptr + slot)
    x = tl.load(x_ptr + slot)
    a0 = tl.zeros((NODES, BS), DT)
    a1 = tl.zeros((NODES, BS), DT)
    b0 = tl.zeros((NODES, BS), DT)
    b1 = tl.zeros((NODES, BS), DT)
    end = _wide(right) * NODES
    for start in range(_wide(left) * NODES, end, BS):
        i = start + tl.arange(0, BS)
        m = i < end
        z = (tl.load(base_ptr + i, mask=m, other=0.0)[None, :] - base[:, None]) * unit
        z += tl.load(x_ptr + i, mask=m, other=0.0)[None, :] - x[:, None]
        w0 = tl.load(mu0_ptr + i, mask=m, other=0.0)
        k0 = _kernel(z, FIRST)
        a0 += k0 * w0[None, :]
        if TWO:
            w1 = tl.load(mu1_ptr + i, mask=m, other=0.0)
            a1 += k0 * w1[None, :]
        if SECOND != "":
            k1 = _kernel(z, SECOND)
            b0 += k1 * w0[None, :]
            if TWO:
                b1 += k1 * w1[None, :]
    return tl.sum(a0, 1), tl.sum(a1, 1), tl.sum(b0, 1), tl.sum(b1, 1)


@triton.jit
def _series(values, crowded, basis):
    """Coefficients of the interpolant of values at the points; the values of rows as they are."""
    return tl.where(crowded, tl.sum(basis * values[:, None], 0), values)


@triton.jit
def bin_sums(
    s_ptr, code_ptr, starts_ptr, first_ptr, tau_ptr, base_ptr, x_ptr, mu_ptr, above_ptr, out_ptr,
    M, L, G, BINS, K, FIRST: tl.constexpr, SECOND: tl.constexpr, TWO: tl.constexpr,
    NODES: tl.constexpr, DT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Sums at every bin, out [kinds, G, slots]: coefficients, or values at its rows."""
    g = tl.program_id(1).to(tl.int64) * (2 if TWO else 1)
    two = g + 1 < G
    k = tl.arange(0, NODES)
    _, basis = _points(NODES, DT)
    slots = _wide(BINS) * NODES
    mu0 = mu_ptr + g * slots
    mu1 = mu0 + tl.where(two, slots, 0)
    for b in range(tl.program_id(0), tl.load(first_ptr + L), tl.num_programs(0)):
        one, left, right = _window(s_ptr, starts_ptr, first_ptr, tau_ptr, b, M, K)
        crowded = (tl.load(code_ptr + tl.load(starts_ptr + b)) & CROWDED) != 0
        slot = _wide(b) * NODES + k
        unit = _unit(tau_ptr, one, DT)
        a0, a1, b0, b1 = _near(
            base_ptr, x_ptr, mu0, mu1, slot, left, right, unit, FIRST, SECOND, TWO, NODES, DT, BS
        )
        if FIRST == "value":
            a0 += tl.load(above_ptr + g * BINS + left).to(DT)
            if TWO:
                a1 += tl.load(above_ptr + (g + 1) * BINS + left, mask=two, other=0.0).to(DT)
        out = out_ptr + g * slots + slot
        tl.store(out, _series(a0, crowded, basis))
        if TWO:
            tl.store(out + slots, _series(a1, crowded, basis), mask=k < tl.where(two, NODES, 0))
        if SECOND != "":
            out += G * slots
            tl.store(out, _series(b0, crowded, basis))
            if TWO:
                tl.store(out + slots, _series(b1, crowded, basis), mask=k < tl.where(two, NODES, 0))


@triton.jit
def bin_means(
    s_ptr, starts_ptr, first_ptr, tau_ptr, base_ptr, x_ptr, mu_ptr, above_ptr, total_ptr,
    value_ptr, node_ptr, window_ptr, M, L, BINS, K, PHI: tl.constexpr, MATES: tl.constexpr,
    PAIRED: tl.constexpr, WEIGHTED: tl.constexpr, GRAD: tl.constexpr, NODES: tl.constexpr,
    DT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Every bin's part of the mean, and at its points what positives there pull by.

    node [3, slots]: on negatives, on positives, on the positive itself. window [BINS, 2]: the bins
    within reach.
    """
    k = tl.arange(0, NODES)
    slots = _wide(BINS) * NODES
    omega = mu_ptr + (2 if WEIGHTED else 1) * slots
    for b in range(tl.program_id(0), tl.load(first_ptr + L), tl.num_programs(0)):
        one, left, right = _window(s_ptr, starts_ptr, first_ptr, tau_ptr, b, M, K)
        slot = _wide(b) * NODES + k
        unit = _unit(tau_ptr, one, DT)
        n0, n1, d0, d1 = _near(
            base_ptr, x_ptr, mu_ptr, mu_ptr + slots, slot, left, right, unit, "value",
            "slope" if GRAD else "", MATES, NODES, DT, BS,
        )  # fmt: skip
        n0 += tl.load(above_ptr + left).to(DT)
        if MATES:
            n1 += tl.load(above_ptr + _wide(BINS) + left).to(DT)
        value, pull, mates, own = _coefficients(n0, n1, d0, d1, PHI, MATES)
        share, _ = _share(total_ptr, one, L, PAIRED, WEIGHTED)
        mine = tl.load(omega + slot)
        tl.store(value_ptr + b, tl.sum((mine * value).to(tl.float64)) * share)
        if GRAD:
            narrow = share.to(DT)
            tl.store(node_ptr + slot, pull * mine * narrow)
            tl.store(node_ptr + slots + slot, mates * mine * narrow)
            tl.store(node_ptr + 2 * slots + slot, own * narrow)
            tl.store(window_ptr + _wide(b) * 2, left)
            tl.store(window_ptr + _wide(b) * 2 + 1, right)


@triton.jit
def _share(total_ptr, one, L, PAIRED: tl.constexpr, WEIGHTED: tl.constexpr):
    """1 / the weight of all positives, and whether the list counts: for PAIRED, has negatives."""
    positives = tl.load(total_ptr + L + one)
    weight = positives
    if WEIGHTED:
        weight = tl.load(total_ptr + 2 * L + one)
    good = (positives > 0.0) & ((weight <= 0.0) == 0)  # a NaN shows
    if PAIRED:
        good &= tl.load(total_ptr + one) > 0.0
    return tl.where(good, 1.0 / tl.where(good, weight, 1.0), 0.0), good


@triton.jit
def add_bins(
    value_ptr, first_ptr, total_ptr, broken_ptr, mean_ptr, defined_ptr, L, PAIRED: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean [L] of the bins' parts, and which lists count."""
    one = tl.program_id(0)
    end = tl.load(first_ptr + one + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(tl.load(first_ptr + one), end, BLOCK):
        b = start + tl.arange(0, BLOCK)
        total += tl.load(value_ptr + b, mask=b < end, other=0.0)
    _, good = _share(total_ptr, one, L, PAIRED, WEIGHTED)
    mean = tl.where(good, tl.sum(total), 0.0)
    mean = tl.where(good & (tl.load(broken_ptr + one) > 0), float("nan"), mean)
    tl.store(mean_ptr + one, mean)
    tl.store(defined_ptr + one, good.to(tl.int8))


@triton.jit
def bin_pulls(
    code_ptr, starts_ptr, first_ptr, tau_ptr, base_ptr, x_ptr, node_ptr, window_ptr, out_ptr,
    M, L, BINS, NODES: tl.constexpr, DT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """What the rows of every bin feel, out [2, slots]: as negatives, as positives.

    And, in place, the third of the nodes' coefficients as a series.
    """
    k = tl.arange(0, NODES)
    _, basis = _points(NODES, DT)
    slots = _wide(BINS) * NODES
    for b in range(tl.program_id(0), tl.load(first_ptr + L), tl.num_programs(0)):
        begin = tl.load(starts_ptr + b).to(tl.int64)
        crowded = (tl.load(code_ptr + begin) & CROWDED) != 0
        unit = _unit(tau_ptr, begin // M, DT)
        left = tl.load(window_ptr + _wide(b) * 2)
        right = tl.load(window_ptr + _wide(b) * 2 + 1)
        slot = _wide(b) * NODES + k
        far, near, _, _ = _near(
            base_ptr, x_ptr, node_ptr, node_ptr + slots, slot, left, right, unit, "slope", "",
            True, NODES, DT, BS,
        )  # fmt: skip
        own = tl.load(node_ptr + 2 * slots + slot)
        tl.store(out_ptr + slot, _series(far * unit, crowded, basis))
        tl.store(out_ptr + slots + slot, _series(near * unit, crowded, basis))
        tl.store(node_ptr + 2 * slots + slot, _series(own * unit, crowded, basis))


@triton.jit
def _read(
    series_ptr, t, alone, crowded, m, NODES: tl.constexpr, BLOCK: tl.constexpr, DT: tl.constexpr
):
    """Of rows in crowded bins the series at t, of others the value at their place."""
    b1 = tl.zeros((BLOCK,), DT)
    b2 = tl.zeros((BLOCK,), DT)
    for kk in tl.static_range(NODES - 1):
        c = tl.load(series_ptr + (NODES - 1 - kk), mask=m & crowded, other=0.0)
        b0 = 2.0 * t * b1 - b2 + c
        b2 = b1
        b1 = b0
    at = tl.where(crowded, 0, alone)
    return t * b1 - b2 + tl.load(series_ptr + at, mask=m, other=0.0)


@triton.jit
def _place(s_ptr, code_ptr, bin_ptr, starts_ptr, r, m, DT: tl.constexpr):
    """Bin of sorted rows, place t in [-1, 1] in a crowded one, place among the rows elsewhere."""
    b = tl.load(bin_ptr + r, mask=m, other=1).to(tl.int64) - 1
    begin = tl.load(starts_ptr + b, mask=m, other=0).to(tl.int64)
    end = tl.load(starts_ptr + b + 1, mask=m, other=1).to(tl.int64)
    high = tl.load(s_ptr + begin, mask=m, other=0.0).to(DT)
    half = 0.5 * (high - tl.load(s_ptr + end - 1, mask=m, other=0.0).to(DT))
    s = tl.load(s_ptr + r, mask=m, other=0.0).to(DT)
    t = 1.0 - (high - s) * tl.where(half > 0.0, 1.0 / tl.where(half > 0.0, half, 1.0), 0.0)
    crowded = (tl.load(code_ptr + r, mask=m, other=0) & CROWDED) != 0
    t = tl.where(crowded, tl.minimum(tl.maximum(t, -1.0), 1.0), 0.0)
    return b, t, tl.where(crowded, 0, r - begin), crowded


@triton.jit
def read_sums(
    s_ptr, code_ptr, order_ptr, bin_ptr, starts_ptr, series_ptr, at_ptr, at_list, at_group,
    broken_ptr, out_ptr, M, L, G, BINS, NODES: tl.constexpr, DT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums out [kinds, L, G, M] at the rows asked for."""
    which = tl.program_id(1).to(tl.int64)  # kind, list, group
    one = (which // G) % L
    g = which % G
    kind = which // (G * L)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = j < M
    r = one * M + j
    b, t, alone, crowded = _place(s_ptr, code_ptr, bin_ptr, starts_ptr, r, m, DT)
    series = series_ptr + (kind * G + g) * BINS * NODES + b * NODES
    found = _read(series, t, alone, crowded, m, NODES, BLOCK, DT)
    found = tl.where(tl.load(broken_ptr + one) > 0, float("nan"), found)
    row = tl.load(order_ptr + r, mask=m, other=0)
    asked = tl.load(at_ptr + one * at_list + g * at_group + row, mask=m, other=0) != 0
    tl.store(out_ptr + which * M + row, tl.where(asked, found, 0.0), mask=m)


@triton.jit
def read_gradient(
    s_ptr, code_ptr, order_ptr, bin_ptr, starts_ptr, out_ptr, own_ptr, sorted_weight_ptr,
    defined_ptr, broken_ptr, g_ptr, M, BINS, WEIGHTED: tl.constexpr, NODES: tl.constexpr,
    DT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient [L, M] of the mean."""
    one = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = j < M
    r = one * M + j
    b, t, alone, crowded = _place(s_ptr, code_ptr, bin_ptr, starts_ptr, r, m, DT)
    code = tl.load(code_ptr + r, mask=m, other=0)
    positive = (code & POSITIVE) != 0
    slots = _wide(BINS) * NODES
    felt = out_ptr + tl.where(positive, slots, 0) + b * NODES
    g = _read(felt, t, alone, crowded, m, NODES, BLOCK, DT)
    own = _read(own_ptr + b * NODES, t, alone, crowded, m & positive, NODES, BLOCK, DT)
    if WEIGHTED:
        own *= tl.load(sorted_weight_ptr + r, mask=m & positive, other=0.0).to(DT)
    g = tl.where((code & VALID) != 0, g - tl.where(positive, own, 0.0), 0.0)
    good = tl.load(defined_ptr + one) != 0
    g = tl.where(good, tl.where(tl.load(broken_ptr + one) > 0, float("nan"), g), 0.0)
    tl.store(g_ptr + one * M + tl.load(order_ptr + r, mask=m, other=0), g, mask=m)


# --- rows of a queue ------------------------------------------------------------------------------


@triton.jit
def _after(count, n, capacity, FRESH: tl.constexpr):
    """The counter after n rows; FRESH: they are as many as the slots, or more."""
    after = count + n
    if FRESH:
        after += capacity - 1
        after -= after % capacity
    return after


@triton.jit
def place_rows(
    rows_ptr, buffer_ptr, count_ptr, where_ptr, value, first, n, width, capacity,
    GIVEN: tl.constexpr, FRESH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The n rows from `first` on, or the value, into the slots after the counter; or nothing."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = k < tl.where(tl.load(where_ptr) != 0, n, 0) * width
    slot = k // width
    if FRESH == 0:
        slot = (tl.load(count_ptr) + slot) % capacity
    if GIVEN:
        x = tl.load(rows_ptr + first * width + k, mask=m)
    else:
        x = tl.zeros((BLOCK,), tl.int64) + value
    tl.store(buffer_ptr + slot * width + k % width, x.to(buffer_ptr.dtype.element_ty), mask=m)


@triton.jit
def seal_count(
    count_ptr, seal_ptr, mark_ptr, before_ptr, where_ptr, n, capacity,
    FRESH: tl.constexpr, TURN: tl.constexpr, FACTOR: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The counter after n rows, or as it is, and its seal, [] and as a float."""
    after = _after(tl.load(before_ptr), n, capacity, FRESH)
    count = tl.where(tl.load(where_ptr) != 0, after, tl.load(count_ptr))
    rest = count % TURN
    seal = tl.where(rest < 0, rest + TURN, rest) * FACTOR ^ BITS
    tl.store(count_ptr, count)
    tl.store(seal_ptr, seal)
    tl.store(mark_ptr, seal.to(tl.float64))


@triton.jit
def judge_batch(
    s_ptr, ids_ptr, weight_ptr, gains_ptr, valid_ptr, keep_ptr, n, C, M, ignored,
    IDS: tl.constexpr, WEIGHTED: tl.constexpr, GRADED: tl.constexpr, LIMIT: tl.constexpr,
    DT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether the numbers [n, C] of rows that count are sound, and any row of M counts.

    With their weights [n] and gains [n, C]. One program: for batches that are not large.
    """
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n * C, BLOCK):
        k = start + tl.arange(0, BLOCK)
        m = k < n * C
        x = tl.load(s_ptr + k, mask=m, other=0.0).to(DT)
        wrong = (_is_finite(x) == 0).to(tl.int32)
        if WEIGHTED:
            weight = tl.load(weight_ptr + k // C, mask=m, other=0.0).to(tl.float64)
            wrong |= ((tl.abs(weight) < LIMIT) == 0).to(tl.int32)
        if GRADED:
            gain = tl.load(gains_ptr + k, mask=m, other=0.0).to(tl.float64)
            wrong |= (((gain >= 0.0) & (gain < LIMIT)) == 0).to(tl.int32)
        if IDS:
            ids = tl.load(ids_ptr + k // C, mask=m, other=0)
            wrong = tl.where(ids == ignored, 0, wrong)
        bad |= wrong
    some = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, M, BLOCK):
        k = start + tl.arange(0, BLOCK)
        some |= (tl.load(valid_ptr + k, mask=k < M, other=0) != 0).to(tl.int32)
    tl.store(keep_ptr, tl.where(tl.max(bad) == 0, tl.max(some), 0).to(tl.int8))
