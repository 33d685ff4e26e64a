"""The kernel of `remat_project` for Hopper, on its warpgroup matrix instructions.

One step of `remat_project` multiplies 64 channels of two blocks with 128 columns of the weight. Two consumer
warpgroups take a block each; a third thread copies the next steps' words, scales and weight rows to shared memory.
A consumer unpacks its block's codes straight into the registers that `wgmma` reads its left operand from: a 32-bit
word r holds tokens r, r + 4p, r + 8p ... of a channel (`numerics.packing`), so fields f and f + 16/p are 16 bits and
64 tokens apart. One shift and one mask give a code of the upper and one of the lower half of the block, which are the
two 64-row operands; or-ing them into a bfloat16 of 128 makes numbers of them without a conversion.

x^ = q s + z is one fused multiply-add for two elements, as exact as the reference's float32 rounded to bfloat16.
Scaling the accumulator instead would take one multiply-add per output and 128 channels, and a second accumulator that
does not fit: with 128 columns to a tile the elements are the cheaper side.

The interpreter lacks `_fields`, `_multiply_add` and register operands of `wgmma`; there are stand-ins for them.
"""

# Pallas annotates neither its transforms nor what its decorators return as they are.
# pyright: reportAbstractUsage=false, reportCallIssue=false

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, BFloat16, UInt32

from xquant_jax.numerics.packing import BLOCK, PLANES
from xquant_jax.numerics.quantization import StreamSpec

HALF = 64
"""Rows of a `wgmma`: the tokens of a block are two such operands."""

CHANNELS = 64
"""Channels of a step, so many that a row of the weight tile's swizzle, 128 bytes, is one instruction group."""

STAGES = 4
"""Steps that may be in shared memory at once: 33 KiB each at 8 bits, beside 64 KiB of results."""

CONSUMERS = 2
"""Warpgroups that multiply, a block each; one more copies."""


@dataclasses.dataclass(frozen=True)
class RematKernel:
    """The kernel for one kind of stream: `blocks` blocks of `width` channels times a weight [width, columns]."""

    spec: StreamSpec
    blocks: int
    columns: int
    interpret: bool

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths in bits of the planes of a code."""
        return PLANES[self.spec.bits]

    @property
    def steps(self) -> int:
        """Steps to a tile of the result."""
        return self.spec.width // CHANNELS

    @property
    def tile(self) -> int:
        """Columns of a tile: 128 tokens' accumulators take as many registers as there are columns."""
        return 128 if self.columns % 128 == 0 else 64

    @property
    def grid(self) -> tuple[int, int]:
        """Pairs of blocks, and tiles of columns."""
        return -(-self.blocks // CONSUMERS), self.columns // self.tile

    def __call__(self, words: list[Array], scale: Array, zero: Array, weight: Array) -> BFloat16[Array, "S N"]:
        """words [blocks * 4p, C] per plane; scale, zero [blocks, C] along a channel, [C / G, S] along a token."""
        numbers = CHANNELS if self.spec.axis == "channel" else BLOCK  # scales of a step and block
        swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        scratch = {
            "words": [
                plgpu.SMEM((STAGES, CONSUMERS, 4 * p, CHANNELS), jnp.uint32, transforms=_tiling(p)) for p in self.planes
            ],
            "scales": plgpu.SMEM((STAGES, CONSUMERS, numbers), jnp.bfloat16),
            "zeros": plgpu.SMEM((STAGES, CONSUMERS, numbers), jnp.bfloat16),
            "weights": plgpu.SMEM((STAGES, CHANNELS, self.tile), jnp.bfloat16, transforms=swizzled),
            "results": plgpu.SMEM((CONSUMERS, BLOCK, self.tile), jnp.bfloat16, transforms=swizzled),
            "full": plgpu.Barrier(num_arrivals=CONSUMERS * (len(self.planes) + 2) + 1, num_barriers=STAGES),
            "free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
        }
        if self.interpret:  # it has no operands in registers
            scratch["operands"] = plgpu.SMEM((CONSUMERS, HALF, CHANNELS), jnp.bfloat16, transforms=swizzled)
        run = plgpu.kernel(
            self._body,
            out_type=jax.ShapeDtypeStruct((self.blocks * BLOCK, self.columns), jnp.bfloat16),
            scratch_types=scratch,
            grid=(math.prod(self.grid),),
            grid_names=("tile",),
            num_threads=CONSUMERS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(lowering_semantics=mgpu.LoweringSemantics.Lane),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )
        return run(*words, scale, zero, weight)

    def _body(self, *refs: Any, results: Any, **tiles: Any) -> None:
        """One tile: 256 tokens times `tile` columns. Tiles that run at the same time share rows and columns."""
        *sources, out = refs
        pair, column = plgpu.planar_snake(lax.axis_index("tile"), self.grid, 0, 8)
        thread = lax.axis_index("warpgroup")
        columns = pl.ds(column * self.tile, self.tile)

        def block(consumer: Any) -> Any:  # an odd last block is multiplied twice, to the same values
            return jnp.minimum(pair * CONSUMERS + consumer, self.blocks - 1)

        @pl.when(thread == CONSUMERS)
        def _copy() -> None:
            plgpu.set_max_registers(40, action="decrease")
            self._copy(sources, [block(consumer) for consumer in range(CONSUMERS)], columns, **tiles)

        @pl.when(thread < CONSUMERS)
        def _multiply() -> None:
            plgpu.set_max_registers(232, action="increase")
            accumulators = [plgpu.WGMMAAccumulatorRef((HALF, self.tile), jnp.float32)] * (BLOCK // HALF)
            halves = pl.run_scoped(lambda *refs: self._multiply(refs, thread, **tiles), *accumulators)
            for half, values in enumerate(halves):
                results[thread, pl.ds(half * HALF, HALF)] = values.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(results.at[thread], out.at[pl.ds(block(thread) * BLOCK, BLOCK), columns])
            plgpu.wait_smem_to_gmem(0)

    def _copy(
        self,
        sources: list[Any],
        blocks: list[Any],
        columns: Any,
        *,
        words: list[Any],
        scales: Any,
        zeros: Any,
        weights: Any,
        full: Any,
        free: Any,
        operands: Any = None,
    ) -> None:
        """Fills the stages, one after the other, as they become free."""
        del operands
        *word_sources, scale, zero, weight = sources

        def step(number: Any, _: None) -> None:
            slot = lax.rem(number, STAGES)
            pl.when(number >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
            channels = pl.ds(number * CHANNELS, CHANNELS)
            for consumer, block in enumerate(blocks):
                for p, source, tiles in zip(self.planes, word_sources, words, strict=True):
                    rows = source.at[pl.ds(block * 4 * p, 4 * p), channels]
                    plgpu.copy_gmem_to_smem(rows, tiles.at[slot, consumer], full.at[slot])
                group = lax.div(number * CHANNELS, self.spec.group)
                where = (block, channels) if self.spec.axis == "channel" else (group, pl.ds(block * BLOCK, BLOCK))
                plgpu.copy_gmem_to_smem(scale.at[where], scales.at[slot, consumer], full.at[slot])
                plgpu.copy_gmem_to_smem(zero.at[where], zeros.at[slot, consumer], full.at[slot])
            plgpu.copy_gmem_to_smem(weight.at[channels, columns], weights.at[slot], full.at[slot])

        lax.fori_loop(0, self.steps, step, None)
        for slot in range(min(self.steps, STAGES)):  # jax 0.11's interpreter wants every completion to be seen
            plgpu.barrier_wait(free.at[slot])

    def _multiply(
        self,
        accumulators: tuple[Any, ...],
        thread: Any,
        *,
        words: list[Any],
        scales: Any,
        zeros: Any,
        weights: Any,
        full: Any,
        free: Any,
        operands: Any = None,
    ) -> list[Array]:
        """x^ W of one block, its upper and its lower half."""

        def step(number: Any, _: None) -> None:
            slot = lax.rem(number, STAGES)
            plgpu.barrier_wait(full.at[slot])
            fields = [
                _fields(tiles.at[slot, thread], p, self.interpret) for p, tiles in zip(self.planes, words, strict=True)
            ]
            for half, accumulator in enumerate(accumulators):
                codes = _as_numbers(fields, self.spec.bits, half)
                scale, zero = (self._spread(tiles.at[slot, thread], half) for tiles in (scales, zeros))
                operand = _multiply_add(codes, scale, zero, self.interpret)
                if operands is not None:
                    operands[thread] = operand
                    operand = operands.at[thread]
                plgpu.wgmma(accumulator, operand, weights.at[slot])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[slot])

        lax.fori_loop(0, self.steps, step, None)
        return [accumulator[...] for accumulator in accumulators]

    def _spread(self, numbers: Any, half: int) -> BFloat16[Array, "64 64"]:
        """A step's scales or zeros, of 64 channels or 128 tokens, for every element of half a block."""
        if self.spec.axis == "channel":
            row = plgpu.load(numbers, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            return lax.broadcast_in_dim(row, (HALF, CHANNELS), (1,))
        column = plgpu.load(numbers.at[pl.ds(half * HALF, HALF)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        return lax.broadcast_in_dim(column, (HALF, CHANNELS), (0,))


def _tiling(p: int) -> tuple[plgpu.TilingTransform]:
    """How the words of a plane lie in shared memory: in tiles of 8 channels, whose 8 rows a warp reads at once, all of
    them from different banks."""
    return (plgpu.TilingTransform((min(8, 4 * p), 8)),)


def _as_numbers(pairs: list[Array], bits: int, half: int) -> BFloat16[Array, "64 64"]:
    """The codes of half a block, exactly, from the fields of its planes in bits 0 and up and 16 and up."""

    def number(
        fields: Array, power: int
    ) -> Array:  # 2**power + code * 2**(power - 7): the exponent is or-ed to the code
        exponent = (power + 127) << 7
        both = fields | jnp.uint32(exponent * 0x10001)
        return lax.bitcast_convert_type((both >> jnp.uint32(16 * half)).astype(jnp.uint16), jnp.bfloat16)

    masked = [pair & jnp.uint32((2**p - 1) * 0x10001) for p, pair in zip(PLANES[bits], pairs, strict=True)]
    if bits == 8:  # a bfloat16 has 8 bits: every term and sum here is exact
        low, high = masked
        return (number(high, 11) - jnp.bfloat16(2**11 + 2**7)) + number(low, 7)
    codes = masked[0] if len(masked) == 1 else masked[0] | (masked[1] << jnp.uint32(PLANES[bits][0]))
    return number(codes, 7) - jnp.bfloat16(2**7)


def _fields(words: Any, p: int, interpret: bool) -> UInt32[Array, "64 64"]:
    """Element [t, c]: the word of token t and channel c, shifted until the token's code is in the lowest bits; the
    code of token t + 64 follows 16 bits above. `words` [4p, 64] is a reference to shared memory."""
    rows = 4 * p
    if interpret:
        shifts = lax.broadcasted_iota(jnp.uint32, (HALF, CHANNELS), 0) // rows * p
        return jnp.tile(words[...], (HALF // rows, 1)) >> shifts
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct((HALF, CHANNELS), jnp.dtype(jnp.uint32), layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(_tiling(p)),), return_type=result)
    def fields(_: Any, tiles: Any) -> Any:
        return _load_fields(tiles, p)

    return fields(words)


def _load_fields(tiles: Any, p: int) -> Any:
    """`_fields` for each thread: two neighbouring channels' words for every register of the operand. The rows that a
    thread holds differ between warps, and Pallas has no load of one row to several warps."""
    index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), i32)
    layout, shape = mgpu.WGMMA_LAYOUT, (HALF, CHANNELS)

    def constant(value: int) -> Any:
        return arith.constant(index, ir.IntegerAttr.get(index, value))

    rows, row_tile, column_tile = (constant(n) for n in (4 * p, min(8, 4 * p), 8))
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    for at, (token, channel) in zip(np.ndindex(registers.shape), layout.thread_idxs(shape), strict=True):
        row, field = arith.remui(token, rows), arith.divui(token, rows)
        where = (
            arith.divui(row, row_tile),
            arith.divui(channel, column_tile),
            arith.remui(row, row_tile),
            arith.remui(channel, column_tile),
        )
        shift = arith.index_cast(i32, arith.muli(field, constant(p)))
        registers[at] = arith.shrui(vector.load(pair, tiles, where), vector.broadcast(pair, shift))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=False)


def _multiply_add(
    codes: BFloat16[Array, "64 64"], scale: BFloat16[Array, "64 64"], zero: BFloat16[Array, "64 64"], interpret: bool
) -> BFloat16[Array, "64 64"]:
    """codes * scale + zero, rounded once; apart, the product would be rounded too."""
    if interpret:
        wide = codes.astype(jnp.float32) * scale.astype(jnp.float32) + zero.astype(jnp.float32)
        return wide.astype(jnp.bfloat16)
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(layout, layout, layout),
        return_type=plgpu.ShapeDtypeStruct((HALF, CHANNELS), jnp.dtype(jnp.bfloat16), layout=layout),
    )
    def multiply_add(_: Any, codes: Any, scale: Any, zero: Any) -> Any:
        registers = np.empty_like(codes.registers)
        for at, q in np.ndenumerate(codes.registers):
            registers[at] = llvm.intr_fma(q, scale.registers[at], zero.registers[at])
        return mgpu.FragmentedArray(_registers=registers, _layout=codes.layout, _is_signed=None)

    return multiply_add(codes, scale, zero)
