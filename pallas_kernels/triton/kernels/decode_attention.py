"""Attention over packed history, in one kernel or in two.

Values are never scaled: the scales and zeros of tokens go onto the probabilities, and codes enter the matrix unit as
they are.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.triton.kernels.codes import at_history, codes_of_half, load_pairs, load_scales, load_vectors
from pallas_kernels.triton.kernels.keys import finish_keys, rebuild, rebuild8

LOWEST = tl.constexpr(-1e30)  # below every score, and finite: differences of it are numbers
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def _mask(score, first, exists, half, query_position, sliding_window, skip, BLOCKS: tl.constexpr):
    """-inf where a query does not see a key: later ones, those before the window, the first `skip` ones, blocks that do
    not exist."""
    row = tl.arange(0, BLOCKS * 64)
    position = (first + row // 64) * 128 + row % 64 + 64 * half
    distance = query_position[None, :] - position[:, None]
    sees = (distance >= 0) & (distance < sliding_window) & (position >= skip)[:, None]
    if BLOCKS > 1:
        there = tl.reshape(tl.broadcast_to(exists[:, None], (BLOCKS, 64)), (BLOCKS * 64,))
        sees = sees & there[:, None]
    return tl.where(sees, score, float("-inf"))


@triton.jit
@no_type_check
def _share(bounds, BATCH: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """The sequence and the blocks of it that this program reads, in whole tiles: all sequences are cut into shares of
    one size, so that long ones have many programs and short ones few. ROWS: a power of two, BATCH or more."""
    number = tl.arange(0, ROWS)
    begin = tl.load(bounds + 4 * number, mask=number < BATCH, other=0)
    end = tl.load(bounds + 4 * number + 1, mask=number < BATCH, other=0)
    blocks = tl.maximum(end - begin, 0)
    # rounded up in each sequence, there are no more shares than programs; or one for each sequence
    more = tl.num_programs(1) - BATCH
    several = (tl.sum(blocks, axis=0) + more - 1) // tl.maximum(more, 1)
    share = tl.where(more > 0, several, tl.max(blocks, axis=0))
    share = tl.maximum((share + BLOCKS - 1) // BLOCKS, 1) * BLOCKS
    shares = (blocks + share - 1) // share
    last = tl.cumsum(shares, axis=0)
    row = tl.minimum(tl.sum((last <= tl.program_id(1)).to(tl.int32), axis=0), BATCH - 1)
    # of the last sequence, what is past its end, if this program is one too many
    first = tl.program_id(1) - tl.sum(tl.where(number == row, last - shares, 0), axis=0)
    begin = tl.sum(tl.where(number == row, begin, 0), axis=0) + first * share
    end = tl.sum(tl.where(number == row, end, 0), axis=0)
    return row, begin, tl.minimum(begin + share, end)


@triton.jit
@no_type_check
def _store_owner(owners, row):
    """Notes whose part this program has, once for all programs that have it."""
    if (tl.program_id(0) == 0) & (tl.program_id(2) == 0):
        tl.store(owners + tl.program_id(1), row)


@triton.jit
@no_type_check
def _score_tile(
    first,
    exists,
    head,
    q_first,
    q_second,
    query_position,
    sliding_window,
    skip,
    seen_from,
    end,
    cos,
    sin,
    base_rotation,
    words,
    words_high,
    scales,
    zeros,
    matrix,
    matrix_first,
    matrix_second,
    sums,
    column_scales,
    bias,
    norm,
    NUM_BLOCKS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Scores of the low and of the high tokens of a tile, [BLOCKS * 64, QUERIES]; -inf: not seen."""
    HALF: tl.constexpr = DIM // 2
    LATENT: tl.constexpr = WIDTH // KV_HEADS
    RESIDENT: tl.constexpr = FORM == "per_head" and CHUNK == LATENT
    i = tl.arange(0, HALF)
    # most tiles are seen by every query: the mask is left out there
    partly = (first * 128 < seen_from) | (first + BLOCKS > end)
    if RESIDENT:
        low, high = load_vectors(
            words, words_high, scales, zeros, first, exists, head * LATENT,
            WIDTH, BITS, GROUP, BLOCKS, LATENT, DTYPE, ARITHMETIC, ASSEMBLY,
        )  # fmt: skip
    elif FORM == "int8" or FORM == "fp8":
        low_first, low_second, high_first, high_second = rebuild8(
            words, words_high, scales, zeros, first, exists, matrix, sums, column_scales, head,
            WIDTH, BITS, GROUP, FORM, DIM, KV_HEADS, BLOCKS, CHUNK, DTYPE, PRECISION,
        )  # fmt: skip
    elif FORM != "identity":
        low_first, low_second, high_first, high_second = rebuild(
            words, words_high, scales, zeros, first, exists, matrix, head,
            WIDTH, BITS, GROUP, FORM, DIM, KV_HEADS, BLOCKS, CHUNK, DTYPE, ARITHMETIC, PRECISION, ASSEMBLY,
        )  # fmt: skip
    else:
        low_first, high_first = load_vectors(
            words, words_high, scales, zeros, first, exists, head * LATENT,
            WIDTH, BITS, GROUP, BLOCKS, HALF, DTYPE, ARITHMETIC, ASSEMBLY,
        )  # fmt: skip
        low_second, high_second = load_vectors(
            words, words_high, scales, zeros, first, exists, head * LATENT + HALF,
            WIDTH, BITS, GROUP, BLOCKS, HALF, DTYPE, ARITHMETIC, ASSEMBLY,
        )  # fmt: skip
    for half in tl.static_range(2):
        # one half of the tokens after the other: the accumulators of both would fill the registers
        if RESIDENT:
            z = high if half else low
            k_first = tl.dot(z, matrix_first, input_precision=PRECISION)
            k_second = tl.dot(z, matrix_second, input_precision=PRECISION)
        else:
            k_first = (high_first if half else low_first).to(tl.float32)
            k_second = (high_second if half else low_second).to(tl.float32)
        k_first, k_second, inverse = finish_keys(
            k_first, k_second, bias, norm, head, cos, sin, NORM_EPS, DIM, HAS_BIAS, HAS_NORM, ROPE, DTYPE, ASSEMBLY
        )
        if ROPE:
            base_cos = tl.load(base_rotation + (2 * first + half) * HALF + i)[:, None]
            base_sin = tl.load(base_rotation + (2 * NUM_BLOCKS + 2 * first + half) * HALF + i)[:, None]
            left = (q_first * base_cos + q_second * base_sin).to(DTYPE)
            right = (q_second * base_cos - q_first * base_sin).to(DTYPE)
        else:
            left, right = q_first.to(DTYPE), q_second.to(DTYPE)
        score = tl.dot(k_first, left, input_precision=PRECISION)
        score = tl.dot(k_second, right, score, input_precision=PRECISION)
        if HAS_NORM:
            score *= inverse[:, None]
        if partly:
            score = _mask(score, first, exists, half, query_position, sliding_window, skip, BLOCKS)
        if half == 0:
            score_low = score
        else:
            score_high = score
    return score_low, score_high


@triton.jit
@no_type_check
def _load_constants(
    q,
    tile_rotation,
    matrix,
    row,
    head,
    query,
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    FORM: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What stays in registers and shared memory: halves of the queries, the tile's rotation, halves of the rebuild."""
    HALF: tl.constexpr = DIM // 2
    LATENT: tl.constexpr = WIDTH // KV_HEADS
    i = tl.arange(0, HALF)
    q += ((row * KV_HEADS + head) * tl.num_programs(2) * QUERIES + query)[None, :] * DIM + i[:, None]
    cos, sin, matrix_first, matrix_second = 0, 0, 0, 0
    if ROPE:
        at = tl.arange(0, BLOCKS * 64)[:, None] * HALF + i[None, :]
        cos = tl.load(tile_rotation + at).to(DTYPE)
        sin = tl.load(tile_rotation + BLOCKS * 64 * HALF + at).to(DTYPE)
    if FORM == "per_head" and CHUNK == LATENT:
        at = (head * LATENT + tl.arange(0, LATENT))[:, None] * DIM + i[None, :]
        matrix_first = tl.load(matrix + at)
        matrix_second = tl.load(matrix + at + HALF)
    return tl.load(q), tl.load(q + HALF), cos, sin, matrix_first, matrix_second


@triton.jit
@no_type_check
def _load_value_scales(
    scales, zeros, first, end, channel, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr
):
    """Scales and zeros of a tile's low and high tokens, [BLOCKS * 64] each; past the end some that mean nothing."""
    exists = first + tl.arange(0, BLOCKS) < end
    if BLOCKS == 1:
        first = tl.maximum(tl.minimum(first, end - 1), 0)
    return (
        load_scales(scales, first, exists, 0, channel, WIDTH, GROUP, BLOCKS),
        load_scales(scales, first, exists, 1, channel, WIDTH, GROUP, BLOCKS),
        load_scales(zeros, first, exists, 0, channel, WIDTH, GROUP, BLOCKS),
        load_scales(zeros, first, exists, 1, channel, WIDTH, GROUP, BLOCKS),
    )


@triton.jit
@no_type_check
def _add_values(
    score_low,
    score_high,
    top,
    total,
    offset,
    acc,
    first,
    exists,
    numbers,
    channel,
    words,
    words_high,
    scale_low,
    scale_high,
    zero_low,
    zero_high,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One tile of the online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867); acc is [CHANNELS, QUERIES].

    The sum of values is acc + offset: acc weighs codes with p * scale, offset collects p * zero and takes the 16 back.
    total and offset are summed over the rows of a tile by the caller, at the end.
    """
    CODE_OFFSET: tl.constexpr = 16.0 if BITS < 8 else 0.0
    higher = tl.maximum(top, tl.max(tl.maximum(score_low, score_high), axis=0))
    shrink = tl.exp2(top - higher)
    p_low = tl.exp2(score_low - higher[None, :])
    p_high = tl.exp2(score_high - higher[None, :])
    total = total * shrink[None, :] + (p_low + p_high)

    scale_low, scale_high = scale_low.to(tl.float32)[:, None], scale_high.to(tl.float32)[:, None]
    zero_low, zero_high = zero_low.to(tl.float32)[:, None], zero_high.to(tl.float32)[:, None]
    weight_low = (p_low * scale_low).to(DTYPE)
    weight_high = (p_high * scale_high).to(DTYPE)
    # the rounded weights, so that what they make of 16 is taken back exactly
    codes_offset = CODE_OFFSET * (weight_low.to(tl.float32) + weight_high.to(tl.float32))
    offset = offset * shrink[None, :] + (p_low * zero_low + p_high * zero_high - codes_offset)

    channels = channel + tl.arange(0, CHANNELS)
    pairs, upper = load_pairs(
        words, words_high, first, exists, channels, WIDTH, BITS, 1, BLOCKS, CHANNELS, ASSEMBLY, numbers
    )
    low, high = codes_of_half(pairs, upper, 0, BITS, ARITHMETIC), codes_of_half(pairs, upper, 1, BITS, ARITHMETIC)
    # tokens t and t + 64 side by side, as they lie in a register
    codes = tl.reshape(tl.join(low, high), (CHANNELS, BLOCKS * 128)).to(DTYPE)
    weights = tl.reshape(tl.permute(tl.join(weight_low, weight_high), (0, 2, 1)), (BLOCKS * 128, QUERIES))
    # each tile is summed apart: a matrix unit that rounds towards zero would do so in all of them
    acc = tl.fma(acc, tl.broadcast_to(shrink[None, :], acc.shape), tl.dot(codes, weights, input_precision=PRECISION))
    return higher, total, offset, acc


@triton.jit
@no_type_check
def _store_part(out, lse, at, real, channel, top, total, offset, acc, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Normalizes and stores attention [rows `at`, WIDTH] and its log-sum-exp; the latter with the first channels."""
    total = tl.sum(total, axis=0)
    some = tl.where(total > 0, total, 1.0)
    acc = (acc + tl.sum(offset, axis=0)[None, :]) / some[None, :]
    value = tl.where(total > 0, (top + tl.log2(some)) * LN_2, float("-inf"))
    if channel == 0:
        tl.store(lse + at, value, mask=real)
    columns = channel + tl.arange(0, CHANNELS)
    tl.store(out + at.to(tl.int64)[None, :] * WIDTH + columns[:, None], acc, mask=real[None, :])


@triton.jit
@no_type_check
def decode(
    scalars,  # int32 [2 + 16]: layer, sliding window; 0 ... 15
    bounds,  # int32 [B, 4]: first block, one past the last one, first token that all queries see, tokens to skip
    q,  # float32 [B, K, all queries of a kv head, DIM]: turned by its position, times scale * log2(e)
    query_positions,  # int32 [B, all queries of a kv head]; -1: no query
    tile_rotation,  # float32 [2, BLOCKS * 64, DIM/2]: cosine and sine for each row's number in the tile
    base_rotation,  # float32 [2, 2 N, DIM/2]: for 0, 64, 128, ...
    key_words,
    key_words_high,
    key_scales,
    key_zeros,
    matrix,
    bias,
    norm,
    value_words,
    value_words_high,
    value_scales,
    value_zeros,
    out,  # float32 [parts, LENGTH * H, VALUE_WIDTH / K], normalized within the part
    lse,  # float32 [parts, LENGTH * H]
    owners,  # int32 [parts]: whose it is
    NUM_BLOCKS: tl.constexpr,  # N, of each sequence
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,  # a power of two, BATCH or more
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,  # of a program; together, LENGTH * SHARED and padding
    LENGTH: tl.constexpr,
    SHARED: tl.constexpr,  # query heads of a kv head
    DIM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a tile
    CHUNK: tl.constexpr,  # channels of a dense rebuild at once
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Attention of one kv head to a share of a sequence's blocks, values of each head side by side."""
    head = tl.program_id(0)
    VALUE_DIM: tl.constexpr = VALUE_WIDTH // KV_HEADS
    row, begin, end = _share(bounds, BATCH, ROWS, BLOCKS)
    history = (tl.load(scalars).to(tl.int64) * BATCH + row) * NUM_BLOCKS
    sliding_window = tl.load(scalars + 1)
    seen_from, skip = tl.load(bounds + 4 * row + 2), tl.load(bounds + 4 * row + 3)
    key_words, key_words_high, key_scales, key_zeros = at_history(
        key_words, key_words_high, key_scales, key_zeros, history, KEY_WIDTH, KEY_BITS, KEY_GROUP
    )
    value_words, value_words_high, value_scales, value_zeros = at_history(
        value_words, value_words_high, value_scales, value_zeros, history, VALUE_WIDTH, VALUE_BITS, VALUE_GROUP
    )
    query = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    query_position = tl.load(query_positions + row * tl.num_programs(2) * QUERIES + query)
    q_first, q_second, cos, sin, matrix_first, matrix_second = _load_constants(
        q, tile_rotation, matrix, row, head, query, KV_HEADS, QUERIES, DIM, KEY_WIDTH, FORM, ROPE, BLOCKS, CHUNK, DTYPE
    )
    top = tl.full((QUERIES,), LOWEST, tl.float32)
    total = tl.full((BLOCKS * 64, QUERIES), 0.0, tl.float32)
    offset = tl.full((BLOCKS * 64, QUERIES), 0.0, tl.float32)
    acc = tl.full((VALUE_DIM, QUERIES), 0.0, tl.float32)
    scale_low, scale_high, zero_low, zero_high = _load_value_scales(
        value_scales, value_zeros, begin, end, head * VALUE_DIM, VALUE_WIDTH, VALUE_GROUP, BLOCKS
    )
    for first in range(begin, end, BLOCKS):
        exists = first + tl.arange(0, BLOCKS) < end
        # a tile ahead, as so few programs do not hide how long they take
        following = _load_value_scales(
            value_scales, value_zeros, first + BLOCKS, end, head * VALUE_DIM, VALUE_WIDTH, VALUE_GROUP, BLOCKS
        )
        score_low, score_high = _score_tile(
            first, exists, head, q_first, q_second, query_position, sliding_window, skip, seen_from, end,
            cos, sin, base_rotation, key_words, key_words_high, key_scales, key_zeros,
            matrix, matrix_first, matrix_second, matrix, matrix, bias, norm,
            NUM_BLOCKS, KV_HEADS, DIM, NORM_EPS, KEY_WIDTH, KEY_BITS, KEY_GROUP, FORM, HAS_BIAS, HAS_NORM, ROPE,
            BLOCKS, CHUNK, DTYPE, ARITHMETIC, PRECISION, ASSEMBLY,
        )  # fmt: skip
        top, total, offset, acc = _add_values(
            score_low, score_high, top, total, offset, acc, first, exists, scalars + 2, head * VALUE_DIM,
            value_words, value_words_high, scale_low, scale_high, zero_low, zero_high, VALUE_WIDTH, VALUE_BITS,
            VALUE_DIM, QUERIES, BLOCKS, DTYPE, ARITHMETIC, PRECISION, ASSEMBLY,
        )  # fmt: skip
        scale_low, scale_high, zero_low, zero_high = following
    number = (query // SHARED) * (KV_HEADS * SHARED) + head * SHARED + query % SHARED  # t, then query head
    at = tl.program_id(1) * (LENGTH * KV_HEADS * SHARED) + number
    _store_part(out, lse, at, query < LENGTH * SHARED, 0, top, total, offset, acc, VALUE_DIM, VALUE_DIM)
    _store_owner(owners, row)


@triton.jit
@no_type_check
def decode_scores(
    scalars,  # these as in `decode`
    bounds,
    q,
    query_positions,
    tile_rotation,
    base_rotation,
    words,
    words_high,
    scales,
    zeros,
    matrix,
    sums,  # these two with a matrix of 8 bits only
    column_scales,
    bias,
    norm,
    scores,  # float32 [B, LENGTH * H, 128 N], in units of log2; blocks out of bounds are not written
    NUM_BLOCKS: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,  # a power of two, BATCH or more
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    LENGTH: tl.constexpr,
    SHARED: tl.constexpr,
    DIM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """The first half of attention where all heads read the whole value stream: scores of one kv head."""
    head = tl.program_id(0)
    row, begin, end = _share(bounds, BATCH, ROWS, BLOCKS)
    history = (tl.load(scalars).to(tl.int64) * BATCH + row) * NUM_BLOCKS
    sliding_window = tl.load(scalars + 1)
    seen_from, skip = tl.load(bounds + 4 * row + 2), tl.load(bounds + 4 * row + 3)
    words, words_high, scales, zeros = at_history(words, words_high, scales, zeros, history, WIDTH, BITS, GROUP)
    query = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    query_position = tl.load(query_positions + row * tl.num_programs(2) * QUERIES + query)
    q_first, q_second, cos, sin, matrix_first, matrix_second = _load_constants(
        q, tile_rotation, matrix, row, head, query, KV_HEADS, QUERIES, DIM, WIDTH, FORM, ROPE, BLOCKS, CHUNK, DTYPE
    )
    number = (query // SHARED) * (KV_HEADS * SHARED) + head * SHARED + query % SHARED
    token = (tl.arange(0, BLOCKS * 64) // 64) * 128 + tl.arange(0, BLOCKS * 64) % 64
    at = (row * (LENGTH * KV_HEADS * SHARED) + number).to(tl.int64)[None, :] * (NUM_BLOCKS * 128) + token[:, None]
    for first in range(begin, end, BLOCKS):
        exists = first + tl.arange(0, BLOCKS) < end
        low, high = _score_tile(
            first, exists, head, q_first, q_second, query_position, sliding_window, skip, seen_from, end,
            cos, sin, base_rotation, words, words_high, scales, zeros,
            matrix, matrix_first, matrix_second, sums, column_scales, bias, norm,
            NUM_BLOCKS, KV_HEADS, DIM, NORM_EPS, WIDTH, BITS, GROUP, FORM, HAS_BIAS, HAS_NORM, ROPE,
            BLOCKS, CHUNK, DTYPE, ARITHMETIC, PRECISION, ASSEMBLY,
        )  # fmt: skip
        there = tl.reshape(tl.broadcast_to(exists[:, None], (BLOCKS, 64)), (BLOCKS * 64,))
        real = there[:, None] & (query < LENGTH * SHARED)[None, :]
        tl.store(scores + at + first * 128, low, mask=real)
        tl.store(scores + at + first * 128 + 64, high, mask=real)


@triton.jit
@no_type_check
def decode_values(
    scalars,
    bounds,
    scores,  # of `decode_scores`
    words,
    words_high,
    scales,
    zeros,
    out,  # float32 [parts, LENGTH * H, WIDTH / VALUE_HEADS], normalized within the part
    lse,  # float32 [parts, LENGTH * H]
    owners,  # int32 [parts]
    NUM_BLOCKS: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,  # a power of two, BATCH or more
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,  # of a program
    LENGTH: tl.constexpr,
    SHARED: tl.constexpr,
    VALUE_HEADS: tl.constexpr,  # KV_HEADS, whose values lie side by side, or 1: all heads read the whole width
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a program: one head's, in one group
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """The second half: softmax of the scores of QUERIES query heads, and CHANNELS channels of their values."""
    VALUE_DIM: tl.constexpr = WIDTH // VALUE_HEADS
    QUERY_ROWS: tl.constexpr = LENGTH * KV_HEADS * SHARED
    channel = tl.program_id(0) * CHANNELS
    row, begin, end = _share(bounds, BATCH, ROWS, BLOCKS)
    history = (tl.load(scalars).to(tl.int64) * BATCH + row) * NUM_BLOCKS
    words, words_high, scales, zeros = at_history(words, words_high, scales, zeros, history, WIDTH, BITS, GROUP)
    query = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    if VALUE_HEADS == KV_HEADS:
        real = query < LENGTH * SHARED
        query = (query // SHARED) * (KV_HEADS * SHARED) + channel // VALUE_DIM * SHARED + query % SHARED
    else:
        real = query < QUERY_ROWS
    token = (tl.arange(0, BLOCKS * 64) // 64) * 128 + tl.arange(0, BLOCKS * 64) % 64
    at = (row * QUERY_ROWS + query).to(tl.int64)[None, :] * (NUM_BLOCKS * 128) + token[:, None]
    top = tl.full((QUERIES,), LOWEST, tl.float32)
    total = tl.full((BLOCKS * 64, QUERIES), 0.0, tl.float32)
    offset = tl.full((BLOCKS * 64, QUERIES), 0.0, tl.float32)
    acc = tl.full((CHANNELS, QUERIES), 0.0, tl.float32)
    for first in range(begin, end, BLOCKS):
        exists = first + tl.arange(0, BLOCKS) < end
        scale_low, scale_high, zero_low, zero_high = _load_value_scales(
            scales, zeros, first, end, channel, WIDTH, GROUP, BLOCKS
        )
        there = tl.reshape(tl.broadcast_to(exists[:, None], (BLOCKS, 64)), (BLOCKS * 64,))
        known = there[:, None] & real[None, :]
        low = tl.load(scores + at + first * 128, mask=known, other=float("-inf"))
        high = tl.load(scores + at + first * 128 + 64, mask=known, other=float("-inf"))
        top, total, offset, acc = _add_values(
            low, high, top, total, offset, acc, first, exists, scalars + 2, channel,
            words, words_high, scale_low, scale_high, zero_low, zero_high, WIDTH, BITS,
            CHANNELS, QUERIES, BLOCKS, DTYPE, ARITHMETIC, PRECISION, ASSEMBLY,
        )  # fmt: skip
    at = tl.program_id(1) * QUERY_ROWS + query
    _store_part(out, lse, at, real, channel % VALUE_DIM, top, total, offset, acc, VALUE_DIM, CHANNELS)
    _store_owner(owners, row)
