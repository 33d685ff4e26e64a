"""The kernel of `decode_attention` for Hopper, on both of its kinds of matrix instructions.

A program attends to one share of a sequence's blocks for one key/value head. Two consumer warpgroups take its blocks
in turn, and a third one copies what is stored to shared memory ahead of them. Codes go straight into registers
(`fragments`): keys are scaled there and multiplied with the head's matrix by `wgmma`, whose sums are turned by RoPE
where they lie and become the left operand of the scores. Values are weighed as they are; the scale of a token goes
onto its probability, and its zero into a sum of its own.

Every warp attends to its own 32 tokens of a block, with a running softmax of its own (Milakov and Gimelshein 2018,
arXiv 1805.02867). So warps wait for each other in `wgmma` only, and their parts are merged outside.

Keys are turned by their number in half a block, with a table in registers, and queries by the rest: the warpgroup that
copies turns them on, half a block at a time.
"""

# Pallas annotates neither its transforms nor what its decorators return as they are.
# pyright: reportAbstractUsage=false, reportCallIssue=false

import dataclasses
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.pallas_gpu import warpgroup
from pallas_kernels.pallas_gpu.fragments import QUERIES, ROWS
from pallas_kernels.pallas_gpu.staging import STAGES, Stream
from xquant_jax.numerics.packing import BLOCK, PLANES
from xquant_jax.numerics.quantization import StreamSpec

LOWEST = -1e30
"""Below every score, and finite: differences of it are numbers."""

CONSUMERS = 2
"""Warpgroups that attend; one more copies."""


@dataclasses.dataclass(frozen=True)
class DecodeKernel:
    """The kernel for one kind of streams, of `heads` key/value heads of dimension `dim`.

    rebuilt: whether each head's keys are multiplied with a matrix; biased: whether a bias is added then
    norm_eps: of the norm that comes last; None: there is none
    """

    key: StreamSpec
    value: StreamSpec
    heads: int
    dim: int
    rebuilt: bool
    biased: bool
    norm_eps: float | None
    interpret: bool

    @property
    def streams(self) -> tuple[Stream, Stream]:
        return Stream(self.key, self.heads), Stream(self.value, self.heads)

    def __call__(
        self,
        work: Array,
        queries: Array,
        turn: Array,
        table: Array,
        distance: Array,
        matrix: Array,
        columns: Array,
        key: tuple[Any, Any, Any],
        value: tuple[Any, Any, Any],
    ) -> tuple[Float[Array, "shares heads 2 sums 8"], Float[Array, "shares heads 2 3 64 8"]]:
        """Every consumer's sums of weighed codes, and in each row the highest score, sums of weights and of offsets.

        work: int32 [shares, 5]: first block, the one behind the last, the first that all queries see whole, the number
            of the sequence's block 0 among all that are stored, the number of its `distance`
        queries: float32 [shares, heads, 2, d / 64 * 8, 32], scaled for scores in base 2, turned to the first block
        turn: float32 [2, d / 64 * 8, 32], cosines and sines of 64 tokens
        table: bfloat16 [2, 64, d / 2], those of the rows
        distance: int32 [n, 2, 64, 8], from the rows of block 0 to the queries, and the largest that is seen
        matrix: bfloat16 [heads * C, d], if keys are rebuilt
        columns: float32 [2 * heads, d], the heads' biases and scales of the norm, likewise
        key, value: words, scale and zero of all layers
        """
        streams = self.streams
        latent, width = (stream.width for stream in streams)
        inputs = [work, queries.reshape(-1, *queries.shape[2:]), turn, table, distance]
        for stream, arrays in zip(streams, (key, value), strict=True):
            inputs += stream.arrays(*arrays)
        planes = sum(len(PLANES[spec.bits]) + 2 for spec in (self.key, self.value))
        scratch = {
            "keys": streams[0].scratch(),
            "values": streams[1].scratch(),
            "turned": plgpu.SMEM((STAGES, 2, 2, self.dim // 64 * QUERIES, 32), jnp.bfloat16),
            "full": plgpu.Barrier(num_arrivals=planes + 1, num_barriers=STAGES),
            "free": plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
        }
        if self.rebuilt:
            inputs += [matrix, columns]
            tiles = warpgroup.swizzled(8, 64)
            scratch["matrix"] = plgpu.SMEM((latent, self.dim), jnp.bfloat16, transforms=tiles)
            scratch["columns"] = plgpu.SMEM((2, self.dim), jnp.float32)
            scratch["ready"] = plgpu.Barrier(num_arrivals=2)
            if self.interpret:  # it has no operands in registers
                scratch["operands"] = plgpu.SMEM((CONSUMERS, ROWS, latent), jnp.bfloat16, transforms=tiles)
        leading = work.shape[0], self.heads, CONSUMERS
        parts = work.shape[0] * self.heads * CONSUMERS
        shapes = (width // 16 * ROWS, QUERIES), (3, ROWS, QUERIES)
        run = plgpu.kernel(
            self._body,
            out_type=[jax.ShapeDtypeStruct((parts, *shape), jnp.float32) for shape in shapes],
            scratch_types=scratch,
            grid=(work.shape[0] * self.heads,),
            grid_names=("program",),
            num_threads=CONSUMERS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Lane),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )
        sums, rows = run(*inputs)
        return sums.reshape(*leading, *shapes[0]), rows.reshape(*leading, *shapes[1])

    def _body(
        self,
        *refs: Any,
        matrix: Any = None,
        columns: Any = None,
        ready: Any = None,
        operands: Any = None,
        **scratch: Any,
    ) -> None:
        work, queries, turn, table, distance, *sources, sums, rows = refs
        program, thread = lax.axis_index("program"), lax.axis_index("warpgroup")
        share, head = lax.div(program, self.heads), lax.rem(program, self.heads)
        begin, end, clear, origin, number = (work[share, i] for i in range(5))
        count = jnp.maximum(end - begin, 0)

        @pl.when(thread == CONSUMERS)
        def _copy() -> None:
            plgpu.set_max_registers(32, action="decrease")
            if self.rebuilt:
                for part in (columns, matrix):
                    size = part.shape[0]
                    plgpu.copy_gmem_to_smem(sources.pop().at[pl.ds(head * size, size)], part, ready)
            self._copy(sources, origin + begin, count, head, queries.at[program], turn, **scratch)

        @pl.when(thread < CONSUMERS)
        def _attend() -> None:
            plgpu.set_max_registers(232, action="increase")
            if self.rebuilt:
                plgpu.barrier_wait(ready)
            rebuild = matrix, columns, None if operands is None else operands.at[thread]
            seen = distance.at[number], begin, clear - begin
            total, *state = self._attend(thread, count, head, table, seen, rebuild, **scratch)
            part = program * CONSUMERS + thread
            sums[part] = total
            for i, row in enumerate(state):
                rows[part, i] = row

    def _copy(
        self,
        sources: list[Any],
        first: Any,
        count: Any,
        head: Any,
        queries: Any,
        turn: Any,
        *,
        keys: list[Any],
        values: list[Any],
        turned: Any,
        full: Any,
        free: Any,
    ) -> None:
        """Fills the stages, one after the other, as they become free."""
        key, value = self.streams
        shape = turned.shape[-2:]
        layout = plgpu.Layout.WG_STRIDED(shape, vec_size=shape[0] * shape[1] // 128)
        cos, sin = (plgpu.load(turn.at[i], layout=layout) for i in range(2))

        def step(number: Any, halves: tuple[Array, Array]) -> tuple[Array, Array]:
            slot = lax.rem(number, STAGES)
            pl.when(number >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
            parts = key.copies(sources[: len(keys)], first + number, head)
            parts += value.copies(sources[len(keys) :], first + number, head)
            for part, stages in zip(parts, keys + values, strict=True):
                plgpu.copy_gmem_to_smem(part, stages.at[slot], full.at[slot])
            for half in range(2):
                for i, x in enumerate(halves):
                    turned[slot, half, i] = x.astype(jnp.bfloat16)
                left, right = halves
                halves = left * cos + right * sin, right * cos - left * sin
            plgpu.barrier_arrive(full.at[slot])
            return halves

        lax.fori_loop(0, count, step, tuple(plgpu.load(queries.at[i], layout=layout) for i in range(2)))
        # jax 0.11's interpreter wants every completion to be seen
        lax.fori_loop(0, jnp.minimum(count, STAGES), lambda slot, _: plgpu.barrier_wait(free.at[slot]), None)

    def _attend(
        self,
        consumer: Any,
        count: Any,
        head: Any,
        table: Any,
        seen: tuple[Any, Any, Any],
        rebuild: tuple[Any, Any, Any],
        *,
        keys: list[Any],
        values: list[Any],
        turned: Any,
        full: Any,
        free: Any,
    ) -> tuple[Array, Array, Array, Array]:
        """Every warp's sums of weighed codes, highest scores, sums of weights and of offsets."""
        key, value = self.streams
        rotation = [plgpu.load(table.at[i], layout=warpgroup.LAYOUT, optimized=False) for i in range(2)]
        group, value_group = key.copied_group(head), value.copied_group(head)
        distance, begin, clear = seen

        def step(turn: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
            sums, top, total, offset = state
            number = consumer + CONSUMERS * turn
            slot = lax.rem(number, STAGES)
            plgpu.barrier_wait(full.at[slot])
            *words, scale, zero = (a.at[slot] for a in keys)
            z = warpgroup.keys(words, scale, zero, self.key.bits, self.key.axis, group, self.interpret)
            scores = [self._scores(half, rebuild, rotation, turned.at[slot, i]) for i, half in enumerate(z)]
            scores = lax.cond(number < clear, lambda *s: _masked(s, distance, begin + number), lambda *s: s, *scores)
            higher = warpgroup.warp_max(jnp.maximum(*scores), top, self.interpret)
            shrink = jnp.exp2(top - higher)
            weights = [jnp.exp2(s - higher) for s in scores]
            total = total * shrink + (weights[0] + weights[1])
            *words, scale, zero = (a.at[slot] for a in values)
            offset = offset * shrink
            scaled = []
            for w, s, z in zip(
                weights, *(warpgroup.tokens(a, value_group, self.interpret) for a in (scale, zero)), strict=True
            ):
                rounded = (w * s).astype(jnp.bfloat16)
                offset += w * z
                if self.value.bits < 8:  # the rounded weights, so that what they make of 128 is taken back exactly
                    offset -= 128 * rounded.astype(jnp.float32)
                scaled.append(rounded)
            sums = warpgroup.weigh(sums, shrink, *scaled, words, self.value.bits, self.interpret)
            plgpu.barrier_arrive(free.at[slot])
            return sums, higher, total, offset

        shapes = (value.width // 16 * ROWS, QUERIES), *[(ROWS, QUERIES)] * 3
        numbers = 0.0, LOWEST, 0.0, 0.0
        state = tuple(
            plgpu.layout_cast(jnp.full(shape, x, jnp.float32), warpgroup.LAYOUT)
            for shape, x in zip(shapes, numbers, strict=True)
        )
        return lax.fori_loop(0, lax.div(count + CONSUMERS - 1 - consumer, CONSUMERS), step, state)

    def _scores(
        self, z: BFloat16[Array, "64 C"], rebuild: tuple[Any, Any, Any], rotation: list[Array], queries: Any
    ) -> Float[Array, "64 8"]:
        """Of half a block."""
        inverse = None
        if self.rebuilt:
            matrix, columns, operand = rebuild
            k = pl.run_scoped(
                lambda ref: _multiplied(ref, z, matrix, operand),
                plgpu.WGMMAAccumulatorRef((ROWS, self.dim), jnp.float32),
            )
            if self.biased:
                k = k + _in_all_rows(columns.at[0])
            if self.norm_eps is not None:  # it is cheaper to multiply scores by its factor
                inverse = lax.rsqrt((k * k).sum(axis=1) / self.dim + self.norm_eps)
                k = k * _in_all_rows(columns.at[1])
            z = k.astype(jnp.bfloat16)
        half = self.dim // 2
        turned = warpgroup.rotate(z[:, :half], z[:, half:], *rotation, self.interpret)
        scores = warpgroup.score(*turned, queries, self.interpret)
        return scores if inverse is None else scores * lax.broadcast_in_dim(inverse, scores.shape, (0,))


def _in_all_rows(columns: Any) -> Float[Array, "64 d"]:
    """Numbers of columns, in shared memory, for every row."""
    row = plgpu.load(columns, layout=warpgroup.LAYOUT.reduce(0), optimized=False)
    return lax.broadcast_in_dim(row, (ROWS, *row.shape), (1,))


def _multiplied(accumulator: Any, z: BFloat16[Array, "64 C"], matrix: Any, operand: Any) -> Float[Array, "64 d"]:
    """z times the matrix."""
    if operand is not None:
        operand[...] = z
        z = operand
    plgpu.wgmma(accumulator, z, matrix)
    plgpu.wgmma_wait(0)
    return accumulator[...]


def _masked(scores: tuple[Array, Array], distance: Any, block: Any) -> tuple[Array, Array]:
    """-inf where a query does not see a token of a block."""
    begin, most = (plgpu.load(distance.at[i], layout=warpgroup.LAYOUT, optimized=False) for i in range(2))
    low, high = (begin - (BLOCK * block + ROWS * half) for half in range(2))
    masked = [jnp.where((d >= 0) & (d <= most), s, -jnp.inf) for s, d in zip(scores, (low, high), strict=True)]
    return masked[0], masked[1]
