"""The operations in Pallas Mosaic GPU, for Hopper: `remat_project` on its warpgroup matrix instructions.

One step of `remat_project` multiplies 64 channels of two blocks with 128 columns of the weight. Two consumer
warpgroups take a block each; a third thread copies the next steps' words, scales and weight rows to shared memory.
A consumer unpacks its block's codes straight into the registers that `wgmma` reads its left operand from: a 32-bit
word r holds tokens r, r + 4p, r + 8p ... of a channel (`xquant_jax.packing`), so fields f and f + 16/p are 16 bits and
64 tokens apart. One shift and one mask give a code of the upper and one of the lower half of the block, which are the
two 64-row operands; or-ing them into a bfloat16 of 128 makes numbers of them without a conversion.

x^ = q s + z is one fused multiply-add for two elements, as exact as the reference's float32 rounded to bfloat16.
Scaling the accumulator instead would take one multiply-add per output and 128 channels, and a second accumulator that
does not fit: with 128 columns to a tile the elements are the cheaper side.

Nobody has seen this kernel run on a device: the tests interpret it, with stand-ins for what the interpreter lacks
(`_fields`, `_multiply_add` and register operands of `wgmma`), and lower it for an H200. `implementation=None` therefore
does not choose it.
"""

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
from jaxtyping import Array, BFloat16, Float, UInt32

from pallas_kernels import target
from xquant_jax.packing import BLOCK, PLANES
from xquant_jax.quantization import UNQUANTIZED, Blocks

PLATFORM = "gpu"

HALF = 64
"""Rows of a `wgmma`: the tokens of a block are two such operands."""

CHANNELS = 64
"""Channels of a step, so many that a row of the weight tile's swizzle, 128 bytes, is one instruction group."""

STAGES = 4
"""Steps that may be in shared memory at once: 33 KiB each at 8 bits, beside 64 KiB of results."""

CONSUMERS = 2
"""Warpgroups that multiply, a block each; one more copies."""


def refuse_remat_project(stream: Blocks, weight: Float[Array, "C N"]) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    spec, columns = stream.spec, weight.shape[1]
    if spec.bits == UNQUANTIZED or spec.format != "uniform":
        return "it unpacks uniform codes of 2, 3, 4 or 8 bits only"
    if weight.dtype != jnp.bfloat16:
        return f"it multiplies bfloat16 weights, not {weight.dtype}"
    if spec.width % CHANNELS or columns % HALF:
        return f"a {spec.width} x {columns} weight; both must be multiples of {CHANNELS}"
    if spec.axis == "channel" and spec.group != BLOCK:
        return f"groups of {spec.group} tokens; along the channel it takes whole blocks of {BLOCK}"
    if spec.axis == "token" and spec.group % CHANNELS:
        return f"groups of {spec.group} channels; it takes multiples of {CHANNELS}"
    return None


def refuse_decode_attention(*args: Any, **kwargs: Any) -> str | None:
    """Always: a kernel is added when it can be run on a device."""
    del args, kwargs
    return "it has no decode kernel yet; implementation='triton' has one"


def decode_attention(*args: Any, **kwargs: Any) -> Any:
    """See `refuse_decode_attention`."""
    raise NotImplementedError(refuse_decode_attention(*args, **kwargs))


def remat_project(stream: Blocks, weight: Float[Array, "C N"]) -> Float[Array, "B S N"]:
    """See `pallas_kernels.api.remat_project`."""
    batch, num_blocks = stream.words[0].shape[:2]
    blocks = batch * num_blocks
    scale, zero = (a.reshape(blocks, *a.shape[2:]) for a in (stream.scale, stream.zero))
    if stream.spec.axis == "token":  # a step reads one group of all tokens: [C/G, tokens]
        scale, zero = (a.reshape(blocks * BLOCK, -1).T for a in (scale, zero))
    else:
        scale, zero = (a.reshape(blocks, -1) for a in (scale, zero))
    words = [w.reshape(-1, w.shape[-1]) for w in stream.words]
    kernel = _Remat(stream.spec.bits, stream.spec.axis, stream.spec.group, blocks, *weight.shape)
    return kernel(words, scale, zero, weight).reshape(batch, num_blocks * BLOCK, weight.shape[1])


@dataclasses.dataclass(frozen=True)
class _Remat:
    """The kernel for streams of one kind: `blocks` blocks of `width` channels times [width, columns]."""

    bits: int
    axis: str
    group: int
    blocks: int
    width: int
    columns: int

    @property
    def tile(self) -> int:
        """Columns of a tile: as many as accumulators of 128 tokens leave registers for."""
        return 128 if self.columns % 128 == 0 else 64

    def __call__(self, words: list[Array], scale: Array, zero: Array, weight: Array) -> BFloat16[Array, "S N"]:
        interpret = target.current().interpret
        planes = PLANES[self.bits]
        scales = CHANNELS if self.axis == "channel" else BLOCK  # numbers of a step and block
        pairs = -(-self.blocks // CONSUMERS)
        grid = (pairs, self.columns // self.tile)

        def body(*refs: Any) -> None:
            inputs, (out,), scratch = refs[: len(planes) + 3], refs[len(planes) + 3 : len(planes) + 4], refs[len(planes) + 4 :]
            word_refs, (scale_ref, zero_ref, weight_ref) = inputs[:-3], inputs[-3:]
            word_tiles, scale_tiles, zero_tiles, weight_tiles, out_tiles, full, free, *operand_tiles = scratch
            pair, column = plgpu.planar_snake(lax.axis_index("tile"), grid, 0, 8)
            thread = lax.axis_index("warpgroup")
            steps = self.width // CHANNELS

            def block(consumer: Any) -> Any:  # an odd last block is computed twice, to the same values
                return jnp.minimum(pair * CONSUMERS + consumer, self.blocks - 1)

            @pl.when(thread == CONSUMERS)
            def _copy() -> None:
                plgpu.set_max_registers(40, action="decrease")

                def copy(step: Any, _: None) -> None:
                    slot = lax.rem(step, STAGES)

                    @pl.when(step >= STAGES)
                    def _wait() -> None:
                        plgpu.barrier_wait(free.at[slot])

                    channels = pl.ds(step * CHANNELS, CHANNELS)
                    for consumer in range(CONSUMERS):
                        b = block(consumer)
                        for p, ref, tiles in zip(planes, word_refs, word_tiles, strict=True):
                            source = ref.at[pl.ds(b * 4 * p, 4 * p), channels]
                            plgpu.copy_gmem_to_smem(source, tiles.at[slot, consumer], full.at[slot])
                        if self.axis == "channel":
                            where = (b, channels)
                        else:
                            where = (lax.div(step * CHANNELS, self.group), pl.ds(b * BLOCK, BLOCK))
                        for ref, tiles in ((scale_ref, scale_tiles), (zero_ref, zero_tiles)):
                            plgpu.copy_gmem_to_smem(ref.at[where], tiles.at[slot, consumer], full.at[slot])
                    source = weight_ref.at[channels, pl.ds(column * self.tile, self.tile)]
                    plgpu.copy_gmem_to_smem(source, weight_tiles.at[slot], full.at[slot])

                lax.fori_loop(0, steps, copy, None)

            @pl.when(thread < CONSUMERS)
            def _multiply() -> None:
                plgpu.set_max_registers(232, action="increase")

                def accumulate(upper: Any, lower: Any) -> tuple[Array, Array]:
                    def multiply(step: Any, _: None) -> None:
                        slot = lax.rem(step, STAGES)
                        plgpu.barrier_wait(full.at[slot])
                        pair_of_codes = [
                            _fields(tiles.at[slot, thread], p, interpret)
                            for p, tiles in zip(planes, word_tiles, strict=True)
                        ]
                        for half, accumulator in enumerate((upper, lower)):
                            codes = _as_numbers(pair_of_codes, self.bits, half)
                            s, z = (self._spread(t.at[slot, thread], half) for t in (scale_tiles, zero_tiles))
                            operand = _multiply_add(codes, s, z, interpret)
                            if interpret:  # it takes no operand from registers
                                operand_tiles[0][thread] = operand
                                operand = operand_tiles[0].at[thread]
                            plgpu.wgmma(accumulator, operand, weight_tiles.at[slot])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[slot])

                    lax.fori_loop(0, steps, multiply, None)
                    return upper[...], lower[...]

                shape = plgpu.ACC((HALF, self.tile), jnp.float32)
                halves = pl.run_scoped(accumulate, shape, shape)
                for half, values in enumerate(halves):
                    out_tiles[thread, pl.ds(half * HALF, HALF)] = values.astype(jnp.bfloat16)
                plgpu.commit_smem()
                tokens, columns = pl.ds(block(thread) * BLOCK, BLOCK), pl.ds(column * self.tile, self.tile)
                plgpu.copy_smem_to_gmem(out_tiles.at[thread], out.at[tokens, columns])
                plgpu.wait_smem_to_gmem(0)

        swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        tiled = lambda p: (plgpu.TilingTransform((min(8, 4 * p), 8)),)
        copies = CONSUMERS * (len(planes) + 2) + 1
        scratch = [
            [
                plgpu.SMEM((STAGES, CONSUMERS, 4 * p, CHANNELS), jnp.uint32, transforms=tiled(p))
                for p in planes
            ],
            plgpu.SMEM((STAGES, CONSUMERS, scales), jnp.bfloat16),
            plgpu.SMEM((STAGES, CONSUMERS, scales), jnp.bfloat16),
            plgpu.SMEM((STAGES, CHANNELS, self.tile), jnp.bfloat16, transforms=swizzled),
            plgpu.SMEM((CONSUMERS, BLOCK, self.tile), jnp.bfloat16, transforms=swizzled),
            plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
        ]
        if interpret:
            scratch.append(plgpu.SMEM((CONSUMERS, HALF, CHANNELS), jnp.bfloat16, transforms=swizzled))
        run = plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((self.blocks * BLOCK, self.columns), jnp.bfloat16),
            scratch_types=scratch,
            grid=(math.prod(grid),),
            grid_names=("tile",),
            num_threads=CONSUMERS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(lowering_semantics=mgpu.LoweringSemantics.Lane),
            interpret=plgpu.InterpretGPUParams() if interpret else None,
        )
        return run(*words, scale, zero, weight)

    def _spread(self, numbers: Any, half: int) -> BFloat16[Array, "64 64"]:
        """A step's scales or zeros of 128 tokens or 64 channels, for each element of half a block."""
        if self.axis == "channel":
            row = plgpu.load(numbers, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            return lax.broadcast_in_dim(row, (HALF, CHANNELS), (1,))
        column = plgpu.load(numbers.at[pl.ds(half * HALF, HALF)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        return lax.broadcast_in_dim(column, (HALF, CHANNELS), (0,))


def _as_numbers(pairs: list[Array], bits: int, half: int) -> BFloat16[Array, "64 64"]:
    """The codes of half a block, exactly, from the fields of its planes in bits 0 and up and 16 and up."""

    def number(fields: Array, power: int) -> Array:  # 2**power + code * 2**(power - 7): the exponent is or-ed to the code
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
    result = plgpu.ShapeDtypeStruct((HALF, CHANNELS), jnp.uint32, layout=layout)
    tiling = (plgpu.TilingTransform((min(8, rows), 8)),)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(tiling),), return_type=result)
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
        return_type=plgpu.ShapeDtypeStruct((HALF, CHANNELS), jnp.bfloat16, layout=layout),
    )
    def multiply_add(_: Any, codes: Any, scale: Any, zero: Any) -> Any:
        registers = np.empty_like(codes.registers)
        for at, q in np.ndenumerate(codes.registers):
            registers[at] = llvm.intr_fma(q, scale.registers[at], zero.registers[at])
        return mgpu.FragmentedArray(_registers=registers, _layout=codes.layout, _is_signed=None)

    return multiply_add(codes, scale, zero)
