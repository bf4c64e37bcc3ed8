"""Triton kernels of attention over a packed row: the forward pass and three kernels of the backward pass.

Import this module only where triton is installed; `fused` builds its tables and calls it.

- A query sees two ranges of keys, [lo, hi) and [own_lo, own_hi) of `RANGES` int32 (4, S), see `flex.key_ranges`. A loop
  over tiles of keys goes through both in turn.
- The GROUP query heads of a KV head are rows of one tile (row = token * GROUP + head), so each key is loaded once for
  all of them.
- Tiles are of one document, since a document's keys are neighbors. A tile of a few neighboring blocks loads their
  common prefix once.
- `LSE` and `DELTA` are fp32 (kv_heads, S * GROUP); the log-sum-exp has base 2.
- Every row and key of the outputs is written by one program, padding included, so none needs to be cleared, and
  results do not depend on the order in which programs run.

All tensors are contiguous, except V in the forward pass: it may have any stride of tokens and heads. DIM is the size
of a head, WIDTH the next power of two.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
QUERY_COLUMNS = tl.constexpr(6)
"""Table of query tiles: first token, end, lo, hi, own_lo, own_hi; the ranges are the union over the tile."""
KEY_COLUMNS = tl.constexpr(10)
"""Table of key tiles: first key, end, two ranges of queries that may see them (first, end, first, end), whether they
are block tokens, steps over the queries (begin, end), and where the sum is written: a slot of `PARTIAL`, or -1."""
SUM_COLUMNS = tl.constexpr(4)
"""Table of key tiles in several parts: first key, end, their slots in `PARTIAL` (begin, end)."""


@triton.jit
def _load(base, at, valid, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Vectors of size DIM that begin at base + at: (rows, WIDTH), zero where not `valid` or beyond DIM."""
    column = tl.arange(0, WIDTH)
    return tl.load(base + at[:, None] + column[None, :], mask=valid[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def _store(base, at, valid, value, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Writes the vectors of value (rows, WIDTH) to base + at."""
    column = tl.arange(0, WIDTH)
    mask = valid[:, None] & (column < DIM)[None, :]
    tl.store(base + at[:, None] + column[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _query_tile(TILES, RANGES, length, heads, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Of this program's tile: where its rows begin in Q and in LSE, their validity, and their ranges of keys."""
    row = tl.arange(0, ROWS)
    token = tl.load(TILES) + row // GROUP
    inside = token < tl.load(TILES + 1)
    at = (token * heads + tl.program_id(0) * GROUP + row % GROUP) * DIM
    at_lse = (tl.program_id(0) * length + token) * GROUP + row % GROUP
    lo = tl.load(RANGES + token, mask=inside, other=0)
    hi = tl.load(RANGES + length + token, mask=inside, other=0)
    own_lo = tl.load(RANGES + 2 * length + token, mask=inside, other=0)
    own_hi = tl.load(RANGES + 3 * length + token, mask=inside, other=0)
    return at, at_lse, inside, lo, hi, own_lo, own_hi


@triton.jit
def _key_step(step, steps, low, high, own_low, own_high, lo, hi, own_lo, own_hi, KEYS: tl.constexpr):
    """Keys of this step, which of them the tile sees, and which pairs are visible: (KEYS,), (KEYS,), (rows, KEYS)."""
    own = step >= steps
    key = tl.where(own, own_low + (step - steps) * KEYS, low + step * KEYS) + tl.arange(0, KEYS)
    seen = (key[None, :] >= tl.where(own, own_lo, lo)[:, None]) & (key[None, :] < tl.where(own, own_hi, hi)[:, None])
    return key, key < tl.where(own, own_high, high), seen


@triton.jit
def _query_step(
    step, first, end, first2, end2, length, heads, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr
):
    """Rows of this step over two ranges of queries: tokens, validity, where they begin in Q and in LSE."""
    row = tl.arange(0, ROWS)
    TOKENS: tl.constexpr = ROWS // GROUP
    steps = tl.cdiv(end - first, TOKENS)
    second = step >= steps
    token = tl.where(second, first2 + (step - steps) * TOKENS, first + step * TOKENS) + row // GROUP
    inside = (token < tl.where(second, end2, end)) & (row < TOKENS * GROUP)
    at = (token * heads + tl.program_id(0) * GROUP + row % GROUP) * DIM
    return token, inside, at, (tl.program_id(0) * length + token) * GROUP + row % GROUP


@triton.jit
def attend(
    Q,
    K,
    V,
    OUT,
    LSE,
    V_COPY,
    TILES,
    RANGES,
    scale,
    length,
    heads,
    v_token,
    v_head,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    COPY: tl.constexpr,
):
    """Output and log-sum-exp of a query tile. Grid: (kv_heads, query tiles).

    With COPY, also a contiguous copy of V for the backward pass: V itself is a view of a tensor several times as large.
    """
    TILES += tl.program_id(1) * QUERY_COLUMNS
    kv_head = tl.program_id(0)
    kv_heads = heads // GROUP
    at, at_lse, inside, lo, hi, own_lo, own_hi = _query_tile(TILES, RANGES, length, heads, GROUP, ROWS, DIM)
    if COPY:
        own = tl.load(TILES) + tl.arange(0, ROWS)
        valid = own < tl.load(TILES + 1)
        value = _load(V, own * v_token + kv_head * v_head, valid, DIM, WIDTH)
        _store(V_COPY, (own * kv_heads + kv_head) * DIM, valid, value, DIM, WIDTH)
    q = _load(Q, at, inside, DIM, WIDTH)
    # a finite start: a row may see no key of the first tiles, and -inf - -inf would be NaN
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    low, high, own_low, own_high = tl.load(TILES + 2), tl.load(TILES + 3), tl.load(TILES + 4), tl.load(TILES + 5)
    steps = tl.cdiv(high - low, KEYS)
    for step in range(steps + tl.cdiv(own_high - own_low, KEYS)):
        key, loaded, seen = _key_step(step, steps, low, high, own_low, own_high, lo, hi, own_lo, own_hi, KEYS)
        k = _load(K, (key * kv_heads + kv_head) * DIM, loaded, DIM, WIDTH)
        v = _load(V, key * v_token + kv_head * v_head, loaded, DIM, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        top = new_top
    total = tl.where(total > 0, total, 1.0)  # padding sees no key; its output is 0
    _store(OUT, at, inside, out / total[:, None], DIM, WIDTH)
    tl.store(LSE + at_lse, top + tl.log2(total), mask=inside)


@triton.jit
def query_gradients(
    Q,
    K,
    V,
    OUT,
    GRAD,
    LSE,
    DELTA,
    DQ,
    TILES,
    RANGES,
    scale,
    length,
    heads,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """DQ of a query tile, and DELTA, the sum of GRAD * OUT of each row. Grid: (kv_heads, query tiles)."""
    TILES += tl.program_id(1) * QUERY_COLUMNS
    kv_head = tl.program_id(0)
    kv_heads = heads // GROUP
    at, at_lse, inside, lo, hi, own_lo, own_hi = _query_tile(TILES, RANGES, length, heads, GROUP, ROWS, DIM)
    q = _load(Q, at, inside, DIM, WIDTH)
    grad = _load(GRAD, at, inside, DIM, WIDTH)
    out = _load(OUT, at, inside, DIM, WIDTH)
    lse = tl.load(LSE + at_lse, mask=inside, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + at_lse, delta, mask=inside)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    low, high, own_low, own_high = tl.load(TILES + 2), tl.load(TILES + 3), tl.load(TILES + 4), tl.load(TILES + 5)
    steps = tl.cdiv(high - low, KEYS)
    for step in range(steps + tl.cdiv(own_high - own_low, KEYS)):
        key, loaded, seen = _key_step(step, steps, low, high, own_low, own_high, lo, hi, own_lo, own_hi, KEYS)
        k = _load(K, (key * kv_heads + kv_head) * DIM, loaded, DIM, WIDTH)
        v = _load(V, (key * kv_heads + kv_head) * DIM, loaded, DIM, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        p = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store(DQ, at, inside, dq * scale, DIM, WIDTH)


@triton.jit
def key_gradients(
    Q,
    K,
    V,
    GRAD,
    LSE,
    DELTA,
    DK,
    DV,
    PARTIAL,
    TILES,
    RANGES,
    scale,
    length,
    heads,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """DK and DV of a key tile over some of its queries, to DK and DV or to PARTIAL. Grid: (kv_heads, key tiles)."""
    TILES += tl.program_id(1) * KEY_COLUMNS
    kv_head = tl.program_id(0)
    kv_heads = heads // GROUP
    key = tl.load(TILES) + tl.arange(0, KEYS)
    valid = key < tl.load(TILES + 1)
    first, end, first2, end2 = tl.load(TILES + 2), tl.load(TILES + 3), tl.load(TILES + 4), tl.load(TILES + 5)
    RANGES += tl.load(TILES + 6) * 2 * length  # block tokens as keys: the ranges own_lo, own_hi
    k = _load(K, (key * kv_heads + kv_head) * DIM, valid, DIM, WIDTH)
    v = _load(V, (key * kv_heads + kv_head) * DIM, valid, DIM, WIDTH)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    for step in range(tl.load(TILES + 7), tl.load(TILES + 8)):
        token, inside, at, at_lse = _query_step(step, first, end, first2, end2, length, heads, GROUP, ROWS, DIM)
        lo = tl.load(RANGES + token, mask=inside, other=0)
        hi = tl.load(RANGES + length + token, mask=inside, other=0)
        lse = tl.load(LSE + at_lse, mask=inside, other=0.0)
        delta = tl.load(DELTA + at_lse, mask=inside, other=0.0)
        q = _load(Q, at, inside, DIM, WIDTH)
        grad = _load(GRAD, at, inside, DIM, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        seen = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
        p = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        dv = tl.dot(tl.trans(p.to(grad.dtype)), grad, dv, input_precision=PRECISION)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    dk *= scale
    slot = tl.load(TILES + 9)
    if slot < 0:
        _store(DK, (key * kv_heads + kv_head) * DIM, valid, dk, DIM, WIDTH)
        _store(DV, (key * kv_heads + kv_head) * DIM, valid, dv, DIM, WIDTH)
    else:
        at = PARTIAL + (slot * kv_heads + kv_head) * (2 * KEYS * WIDTH)
        at += tl.arange(0, KEYS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(at, dk)
        tl.store(at + KEYS * WIDTH, dv)


@triton.jit
def add_parts(PARTIAL, DK, DV, TILES, kv_heads, KEYS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """DK and DV of a key tile that `key_gradients` wrote in parts. Grid: (kv_heads, key tiles in parts)."""
    TILES += tl.program_id(1) * SUM_COLUMNS
    kv_head = tl.program_id(0)
    key = tl.load(TILES) + tl.arange(0, KEYS)
    valid = key < tl.load(TILES + 1)
    at = tl.arange(0, KEYS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    for slot in range(tl.load(TILES + 2), tl.load(TILES + 3)):
        part = PARTIAL + (slot * kv_heads + kv_head) * (2 * KEYS * WIDTH) + at
        dk += tl.load(part)
        dv += tl.load(part + KEYS * WIDTH)
    _store(DK, (key * kv_heads + kv_head) * DIM, valid, dk, DIM, WIDTH)
    _store(DV, (key * kv_heads + kv_head) * DIM, valid, dv, DIM, WIDTH)
