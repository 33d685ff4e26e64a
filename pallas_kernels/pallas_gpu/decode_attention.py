"""`decode_attention` for Hopper: work is cut into shares, the kernel's arrays are laid out, and parts merged.

Nobody has seen this kernel run on a device: the tests interpret it, run the instructions of `fragments` for every
thread, and compile it for Hopper. `implementation=None` therefore does not choose it.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Bool, Float, Int

from pallas_kernels import gpus, target
from pallas_kernels.calls import MOST_NEW_TOKENS, DecodeAttention
from pallas_kernels.operands import KeyRebuild
from pallas_kernels.pallas_gpu.decode_attention_kernel import DecodeKernel
from pallas_kernels.pallas_gpu.fragments import QUERIES, ROWS, by_channel, by_row, by_thread
from pallas_kernels.pallas_gpu.remat_project import HOPPER
from pallas_kernels.pallas_gpu.staging import Stream
from pallas_kernels.streams import refuse_stream
from xquant_jax.numerics import rope
from xquant_jax.numerics.attention import Part
from xquant_jax.numerics.packing import BLOCK

DIMS = (64, 128)

BLOCKS_PER_SHARE = 4
"""At least: less work does not pay for a program of its own."""


def refuse(call: DecodeAttention) -> str | None:
    """Why the kernel cannot take a call; None if it can."""
    length, _, dim = call.q.shape[1:]
    kv_heads, key, value, rebuild = call.num_kv_heads, call.key_stream.spec, call.values.spec, call.key_rebuild
    capability = gpus.current().capability
    if capability != HOPPER and not target.current().interpret:
        return f"it needs compute capability {HOPPER} (Hopper), and this GPU has {capability}"
    if call.q.dtype != jnp.bfloat16:
        return f"it takes bfloat16 queries, not {call.q.dtype}"
    if length > MOST_NEW_TOKENS:
        return f"{length} new tokens are not taken; up to {MOST_NEW_TOKENS} are"
    if rebuild.matrix is not None and rebuild.matrix.ndim != 3:
        return "keys are rebuilt by a matrix for each kv head (basis=per_head), not by one for all heads"
    if rebuild.matrix is not None and rebuild.matrix.dtype != jnp.bfloat16:
        return f"it rebuilds keys with bfloat16 matrices, not {rebuild.matrix.dtype}"
    if rebuild.matrix is None and not (rebuild.bias is None and rebuild.norm is None):
        return "keys that are stored as they are take no bias and no norm"
    if call.value_heads != kv_heads:
        return "values that all heads read whole are not taken; those that lie apart for each kv head are"
    if value.axis != "token":
        return "values quantized along the channel are not taken; along the token they are"
    widths = {"a head dimension": dim, "keys": key.width // kv_heads, "values": value.width // kv_heads}
    for what, width in widths.items():
        if width not in DIMS:
            return f"{what} of {width} for each head is not taken; 64 and 128 are"
    if not call.key_stream.planes[0].size:
        return "a history without blocks"
    return (
        refuse_stream("the key stream", key, widths["keys"])
        or refuse_stream("the value stream", value, widths["values"])
        or Stream(key, kv_heads).refuse()
        or Stream(value, kv_heads).refuse()
    )


def run(call: DecodeAttention) -> Part:
    """Attends with the kernel: a program for each share of a sequence, `QUERIES` queries and kv head."""
    geometry, kv_heads, rebuild = call.geometry, call.num_kv_heads, call.key_rebuild
    batch, length, heads, dim = call.q.shape
    num_blocks = call.key_stream.planes[0].shape[2]
    queries = length * heads // kv_heads
    tiles = -(-queries // QUERIES)
    splits = _splits(batch * kv_heads * tiles, num_blocks)
    begin, end, clear = _shares(call, splits)
    origin = (jnp.asarray(call.layer, jnp.int32) * batch + jnp.arange(batch)) * num_blocks
    tile = jnp.arange(batch * tiles).reshape(batch, 1, tiles)
    work = [a[..., None] for a in (begin, end, clear[:, None], origin[:, None])]
    work = [jnp.broadcast_to(a, (batch, splits, tiles)) for a in (*work, tile)]

    frequencies = geometry.frequencies * (0.0 if geometry.rotated else 1.0)
    turn = jnp.stack(rope.rotation(jnp.array(ROWS), frequencies)).reshape(2, -1, 1, 32)
    table = jnp.stack([by_thread(by_row(a)) for a in rope.rotation(jnp.arange(ROWS), frequencies)])
    kernel = DecodeKernel(
        call.key_stream.spec,
        call.values.spec,
        kv_heads,
        dim,
        rebuilt=rebuild.matrix is not None,
        biased=rebuild.bias is not None,
        norm_eps=None if rebuild.norm is None else rebuild.norm_eps,
        interpret=target.current().interpret,
    )
    sums, rows = kernel(
        jnp.stack(work, axis=-1).reshape(-1, 5),
        _turned_queries(call, begin, tiles, frequencies),
        jnp.tile(turn, (1, 1, QUERIES, 1)).reshape(2, -1, 32),
        table.astype(jnp.bfloat16),
        _distances(call, tiles),
        *_of_heads(rebuild, kv_heads, dim),
        *((stream.planes, stream.scale, stream.zero) for stream in (call.key_stream, call.values)),
    )
    found = (
        a[:, :, :queries].reshape(batch, kv_heads, length, -1, a.shape[-1])
        for a in _merge(sums, rows, _positions(call, tiles) >= 0)
    )
    out, lse = (a.swapaxes(1, 2).reshape(batch, length, heads, -1) for a in found)
    return Part(out, lse[..., 0])


def _turned_queries(
    call: DecodeAttention, begin: Int[Array, "B splits"], tiles: int, frequencies: Float[Array, " half"]
) -> Float[Array, "shares K 2 rows 32"]:
    """Queries as the kernel has them: turned to where a program begins, in tiles, halves and 32 channels."""
    q, splits = call.q, begin.shape[1]
    length, heads, dim = q.shape[1:]
    relative = jnp.repeat(call.geometry.positions, splits, axis=0) - BLOCK * begin.reshape(-1, 1)
    scaled = q.astype(jnp.float32) * (call.geometry.scale * math.log2(math.e))
    turned = rope.rotate_heads(jnp.repeat(scaled, splits, axis=0), relative, frequencies)
    turned = turned.reshape(-1, length, call.num_kv_heads, heads // call.num_kv_heads, dim).swapaxes(1, 2)
    turned = _pad(turned.reshape(*turned.shape[:2], -1, dim), tiles, axis=2)
    turned = turned.reshape(-1, call.num_kv_heads, tiles, QUERIES, 2, dim // 64, 32)
    return turned.transpose(0, 2, 1, 4, 5, 3, 6).reshape(-1, call.num_kv_heads, 2, dim // 64 * QUERIES, 32)


def _positions(call: DecodeAttention, tiles: int) -> Int[Array, "B queries"]:
    """Of the queries of a kv head; -1 where there is none."""
    positions = call.geometry.positions.astype(jnp.int32)
    positions = jnp.repeat(positions, call.q.shape[2] // call.num_kv_heads, axis=1)
    return _pad(positions, tiles, axis=1, value=-1)


def _distances(call: DecodeAttention, tiles: int) -> Int[Array, "tiles 2 64 8"]:
    """From the rows of a sequence's first block to its queries; and the largest at which a query sees a token."""
    positions = _positions(call, tiles).reshape(-1, 1, QUERIES)
    skip = jnp.repeat(call.skip, tiles)[:, None, None]
    most = jnp.minimum(jnp.asarray(call.geometry.sliding_window, jnp.int32) - 1, positions - skip)
    distance = positions - by_row(jnp.arange(ROWS))[None, :, None]
    return jnp.stack([distance, jnp.broadcast_to(most, distance.shape)], axis=1)


def _of_heads(
    rebuild: KeyRebuild, kv_heads: int, dim: int
) -> tuple[BFloat16[Array, "rows d"], Float[Array, "two_of_a_head d"]]:
    """What all keys of a head are rebuilt with: its matrix; its bias and the norm's scale."""
    if rebuild.matrix is None:
        return jnp.zeros((0, dim), jnp.bfloat16), jnp.zeros((0, dim))
    matrix = by_thread(by_thread(rebuild.matrix).swapaxes(1, 2)).swapaxes(1, 2).reshape(-1, dim)
    shape = kv_heads, dim
    bias = jnp.zeros(shape) if rebuild.bias is None else rebuild.bias.astype(jnp.float32).reshape(shape)
    norm = jnp.ones(dim) if rebuild.norm is None else rebuild.norm.astype(jnp.float32)
    return matrix, by_thread(jnp.stack([bias, jnp.broadcast_to(norm[None], shape)], axis=1).reshape(-1, dim))


def _splits(programs: int, num_blocks: int) -> int:
    """Parts to cut each sequence into: for no more programs than four rounds take, one at once on a multiprocessor."""
    return max(1, min(4 * gpus.current().multiprocessors // programs, num_blocks // BLOCKS_PER_SHARE))


def _shares(
    call: DecodeAttention, splits: int
) -> tuple[Int[Array, "B splits"], Int[Array, "B splits"], Int[Array, " B"]]:
    """Blocks that a program begins and ends with, and of each sequence the first that all queries see whole."""
    positions, window = call.geometry.positions, call.geometry.sliding_window
    blocks, num_blocks = call.history_blocks, call.key_stream.planes[0].shape[2]
    earliest, latest = call.geometry.earliest(), positions.max(axis=1)
    oldest = jnp.maximum(earliest - window + 1, 0) // BLOCK
    share = -(-jnp.maximum(blocks - oldest, 0) // splits)
    begin = oldest[:, None] + share[:, None] * jnp.arange(splits)[None]
    end = jnp.minimum(begin + share[:, None], blocks[:, None])
    clear = -(-jnp.maximum(latest - window + 1, call.skip) // BLOCK)
    # queries that see something lie behind all blocks; if some did not, no token would count as seen by all
    clear = jnp.where(earliest >= blocks * BLOCK, clear, num_blocks)
    return begin.astype(jnp.int32), end.astype(jnp.int32), clear.astype(jnp.int32)


def _merge(
    sums: Float[Array, "shares K 2 sums 8"], rows: Float[Array, "shares K 2 3 64 8"], sees: Bool[Array, "B queries"]
) -> tuple[Float[Array, "B K queries C"], Float[Array, "B K queries 1"]]:
    """Attention over the parts of all warps, which are not normalized; as `attention.merge`. Queries that do not see
    anything are masked here: the kernel masks no block that all others see."""
    batch, tiles = len(sees), sees.shape[1] // QUERIES
    sums = by_channel(jnp.moveaxis(sums, 3, 0))  # [4, C, shares, K, 2, 8]
    sums = sums.reshape(*sums.shape[:2], batch, -1, tiles, *sums.shape[3:])
    rows = rows.reshape(batch, -1, tiles, *rows.shape[1:3], 3, 4, ROWS // 4, QUERIES)
    top = rows[..., 0, :, 0, :]  # [B, splits, tiles, K, 2, 4, 8], the same in all rows of a warp
    total, offset = (rows[..., i, :, :, :].sum(axis=-2) for i in (1, 2))
    parts = 1, 4, 5
    highest = top.max(axis=parts, keepdims=True)
    weights = jnp.where(sees.reshape(batch, 1, tiles, 1, 1, 1, QUERIES), jnp.exp2(top - highest), 0.0)
    total, offset = ((weights * a).sum(axis=parts).swapaxes(1, 2) for a in (total, offset))  # [B, K, tiles, 8]
    out = jnp.einsum("bstkxwq,wcbstkxq->bktqc", weights, sums, precision="highest") + offset[..., None]
    some = jnp.where(total > 0, total, 1.0)
    highest = highest[:, 0, :, :, 0, 0].swapaxes(1, 2)
    lse = jnp.where(total > 0, (highest + jnp.log2(some)) * math.log(2), -jnp.inf)
    shape = *out.shape[:2], tiles * QUERIES, -1
    return (out / some[..., None]).reshape(shape), lse.reshape(shape)


def _pad(a: Array, tiles: int, axis: int, value: int = 0) -> Array:
    """To so many times QUERIES."""
    widths = [(0, tiles * QUERIES - n if i == axis else 0) for i, n in enumerate(a.shape)]
    return jnp.pad(a, widths, constant_values=value)
