"""Instructions on the registers of a thread, for what Pallas has no operation for."""

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector


class Lane:
    """The thread that runs: its warp w, and g and c of its lane 4 g + c."""

    def __init__(self) -> None:
        self.i32 = ir.IntegerType.get_signless(32)
        thread = utils.thread_idx()
        self.w = self.number("and", self.number("shr", thread, 5), 3)
        self.g = self.number("and", self.number("shr", thread, 2), 7)
        self.c = self.number("and", thread, 3)

    def number(self, name: str, a: Any, b: Any) -> Any:
        """An operation on 32-bit numbers, either of which may be a constant."""
        operation = {
            "add": arith.addi,
            "sub": arith.subi,
            "mul": arith.muli,
            "and": arith.andi,
            "or": arith.ori,
            "xor": arith.xori,
            "shl": arith.shli,
            "shr": arith.shrui,
        }[name]
        return operation(*(utils.c(x, self.i32) if isinstance(x, int) else x for x in (a, b)))

    def load(self, kind: Any, length: int, memref: Any, *at: Any) -> Any:
        """A vector of a reference to shared memory."""
        index = ir.IndexType.get()
        where = [utils.c(i, index) if isinstance(i, int) else arith.index_cast(index, i) for i in at]
        return vector.load(ir.VectorType.get((length,), kind), memref, where)

    def row_and_shift(self, p: int, c: Any) -> tuple[Any, Any]:
        """Where token 4 w + c of a plane of p bits lies: the row of words, and how far up in the word."""
        token = self.number("add", self.number("shl", self.w, 2), c)
        shift = {4: 4, 2: 3, 1: 2}[p]  # of the 4 p rows
        row = self.number("and", token, 4 * p - 1)
        return row, self.number("mul", self.number("shr", token, shift), p)

    def words(self, memref: Any, p: int, row: Any, column: int, piece: Any) -> list[Any]:
        """Four neighbouring channels' words: of 32 channels, number `column` of a plane, the `piece`-th four."""
        rows = min(8, 4 * p)
        tile, in_tile = self.number("shr", row, 3), self.number("and", row, rows - 1)
        swapped = self.number("add", in_tile, column * rows % 8) if rows < 8 else in_tile
        piece = self.number("xor", piece, self.number("and", swapped, 7))
        four = self.load(self.i32, 4, memref, tile, column, in_tile, self.number("shl", piece, 2))
        return [extract(four, i) for i in range(4)]


def multiply(left: Sequence[Any], right: Sequence[Any], total: Sequence[Any]) -> list[Any]:
    """total [16, 8] + left [16, 16] right [16, 8], of a warp."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    operands = [utils.bitcast(x, i32) for x in (*left, *right)]
    code = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3},{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};"
    struct = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*operands, *total],
        code,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        has_side_effects=True,
    )
    return [llvm.extractvalue(f32, struct, [i]) for i in range(4)]


def transpose(pair: Any) -> Any:
    """8 x 8 numbers of a warp, row g's 2 c and 2 c + 1 in a thread: column g's instead."""
    return assembly("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", pair, together=True)


def permute(a: Any, b: Any, digits: int) -> Any:
    """Four bytes of eight; each digit is the number of one of a (0 to 3) or of b (4 to 7), that of the lowest last."""
    return assembly(f"prmt.b32 $0, $1, $2, {digits};", "=r,r,r", a, b)


def select_bits(x: Any, mask: int, more: Any) -> Any:
    """x & mask | more, in one instruction, which the assembler does not make of two."""
    if isinstance(more, int):
        return assembly(f"lop3.b32 $0, $1, {mask}, {more}, 0xEA;", "=r,r", x)
    return assembly(f"lop3.b32 $0, $1, {mask}, $2, 0xEA;", "=r,r,r", x, more)


def assembly(code: str, registers: str, *operands: Any, together: bool = False) -> Any:
    """One instruction on 32-bit registers; `together`: of all lanes, so that nothing may move it."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [utils.bitcast(x, i32) for x in operands], code, registers, has_side_effects=together)


def extract(x: Any, i: int) -> Any:
    return vector.extract(x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def as_pair(x: Any) -> Any:
    return utils.bitcast(x, ir.VectorType.get((2,), ir.BF16Type.get()))


def two_of(x: Any, number: int) -> Any:
    """Elements 2 number and 2 number + 1 of a vector."""
    kind = ir.VectorType.get((2,), ir.VectorType(x.type).element_type)
    return vector.extract_strided_slice(kind, x, [2 * number], [2], [1])


def splat(value: float) -> Any:
    return utils.c(value, ir.VectorType.get((2,), ir.BF16Type.get()))


def pair_of(x: Any) -> Any:
    return vector.broadcast(ir.VectorType.get((2,), x.type), x)


def widen(x: Any) -> Any:
    """A bfloat16 number in float32, which has the same bits and more of them: quicker than a conversion."""
    i16, i32 = (ir.IntegerType.get_signless(n) for n in (16, 32))
    upper = arith.shli(arith.extui(i32, utils.bitcast(x, i16)), utils.c(16, i32))
    return utils.bitcast(upper, ir.F32Type.get())


def float_pair(a: Any, b: Any) -> Any:
    return vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), [a, b])
