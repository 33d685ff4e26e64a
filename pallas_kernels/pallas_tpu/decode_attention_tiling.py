"""How `decode_attention` cuts its work: the sizes that one call's kernel is built from."""

import dataclasses
import math

from pallas_kernels import chips, eight_bits
from pallas_kernels.calls import DecodeAttention
from pallas_kernels.pallas_tpu import chip
from pallas_kernels.pallas_tpu.streams import LANES, SUBLANES
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import StreamSpec

LONGEST_TILE, LEAST_WORDS, MOST_WORDS = 64, 2**21, 2**22
"""Blocks of a step of the grid at most, and bytes of their words: a larger step costs less for each token, but nothing
is computed before the first has been read."""
BUNDLES_AT_ONCE = 16
"""Bundles of a block each that are worked on together; chunks are of 4 to 16 blocks."""
LOOPED_TILE, LOOPED_CHUNK, SMALL_CHUNK = 16, 8, 2
"""Where bundles are a loop: blocks of a step of the grid; of them, blocks that are worked on together, as the matrix
unit takes the more rows for each part of a large matrix; and that the last few are."""
WORKING_ROOM = 12 * 2**20
"""Bytes of vector memory for everything but words, a dense rebuild matrix and the results that go with it."""
UNROLL_UP_TO = 2**20
"""Multiplications per token that are unrolled; what is more is a loop over bundles."""


@dataclasses.dataclass(frozen=True)
class DecodeTiling:
    """The static side of a call, and the sizes that follow from it."""

    key: StreamSpec
    value: StreamSpec
    shared: bool  # key and value stream are one
    num_blocks: int
    batch: int
    new: int  # T
    heads: int  # H
    kv_heads: int  # K
    dim: int  # d
    value_heads: int
    dense: bool
    eight_bits: str | None  # the type of the dense matrix, if it has 8: a name of `eight_bits.TYPES`
    rotated: bool
    bias: bool
    norm_eps: float | None
    scale: float
    chip: chips.TPU

    @classmethod
    def of(cls, call: DecodeAttention) -> "DecodeTiling":
        batch, new, heads, dim = call.q.shape
        rebuild = call.key_rebuild
        return cls(
            key=call.key_stream.spec,
            value=call.values.spec,
            shared=call.value_stream is None,
            num_blocks=call.key_stream.planes[0].shape[2],
            batch=batch,
            new=new,
            heads=heads,
            kv_heads=call.num_kv_heads,
            dim=dim,
            value_heads=call.value_heads,
            dense=rebuild.matrix is not None and rebuild.matrix.ndim == 2,
            eight_bits=None if rebuild.matrix is None else eight_bits.name_of(rebuild.matrix.dtype),
            rotated=call.geometry.rotated,
            bias=rebuild.bias is not None,
            norm_eps=None if rebuild.norm is None else rebuild.norm_eps,
            scale=call.geometry.scale,
            chip=chip.current(),
        )

    @property
    def tile(self) -> int:
        """Blocks of a step of the grid: fewer than usual where vector memory has no room for two steps' words."""
        streams = [self.key] if self.shared else [self.key, self.value]
        words = sum(BLOCK * spec.width * spec.bits // 8 for spec in streams)
        if self.looped:
            tile, room = LOOPED_TILE, (self._room - self._chunk_bytes(self._looped_chunk)) // 2
        else:
            most = min(max(LEAST_WORDS, self.num_blocks * words // 8), MOST_WORDS)  # an eighth of a short history
            tile, room = LONGEST_TILE, min(self._room // 2, most)
        while tile > 1 and tile * words > room:
            tile //= 2
        return min(tile, self.num_blocks)

    @property
    def _room(self) -> int:
        """Bytes of vector memory that are left for words, and for chunks of more than the least."""
        matrix = (1 if self.eight_bits else 2) * self.key.width * self.kv_heads * self.dim if self.dense else 0
        results = result_bytes(self.new * self.heads, self.value.width) if self.dense else 0
        return self.chip.vmem * 7 // 8 - matrix - results - WORKING_ROOM

    def _chunk_bytes(self, blocks: int) -> int:
        """What a larger chunk takes more than the least one: x^, keys, and what is kept beside them."""
        keys = (1 + self.sines_apart + (self.norm_eps is not None)) * self.kv_heads * self.dim
        scales = 2 * LANES * self.key_groups if self.eight_bits else 0  # float32, in all lanes
        return (blocks - SMALL_CHUNK) * BLOCK * 2 * (self.key.width + keys + scales)

    @property
    def _looped_chunk(self) -> int:
        blocks = LOOPED_CHUNK
        while blocks > SMALL_CHUNK and 2 * self._chunk_bytes(blocks) > self._room:  # as much is left for words
            blocks //= 2
        return blocks

    @property
    def splits(self) -> int:
        """Pieces that each sequence's history is cut into, so that every core of a chip has one."""
        return self.chip.cores if self.batch % self.chip.cores else 1

    @property
    def pieces(self) -> int:
        return self.batch * self.splits

    @property
    def chunks(self) -> tuple[int, int]:
        """Blocks that are worked on together: while there are enough of them, and where fewer are left. Where nothing
        is a loop there is one size, and what does not exist is masked."""
        if self.looped:
            return math.gcd(self._looped_chunk, self.tile), math.gcd(SMALL_CHUNK, self.tile)
        chunk = math.gcd(max(4, BUNDLES_AT_ONCE // self.bundles), self.tile)
        return chunk, chunk

    @property
    def behind(self) -> int:
        """Blocks by which scores and values follow the rebuilt keys: a chunk, if the two are to overlap."""
        return 0 if self.looped else self.chunks[0]

    @property
    def turn(self) -> int:
        """Blocks that share the constant tables of RoPE: of a chunk."""
        return self.chunks[0]

    @property
    def product(self) -> int:
        """Blocks of a product with a part of the matrix: of a chunk's products each matrix unit has one."""
        return self.turn if self.looped else max(1, self.turn // self.chip.mxus)

    @property
    def sines_apart(self) -> bool:
        """Whether keys times cosine and keys times sine are two left operands of the scores. Rolling and adding them
        takes float32 registers for as long as a roll takes, and there are too few."""
        return not self.chip.bf16_alu

    @property
    def looped(self) -> bool:
        """Whether bundles are a loop in the kernel; unrolled, they overlap better."""
        return self.eight_bits is not None or self.bundles * self.bundle_channels * self.width > UNROLL_UP_TO

    @property
    def unroll(self) -> int:
        """Bundles in a turn of that loop: two products in 8 bits overlap, which have more to do between them."""
        return math.gcd(2, self.bundles) if self.eight_bits else 1

    @property
    def ways(self) -> int:
        """Tokens whose codes share a word when keys are rebuilt: the order of keys, see `unpack`."""
        return 4 if self.eight_bits == "int8" else 2

    @property
    def key_groups(self) -> int:
        """Groups of channels of the key stream, if it is quantized along the token."""
        return self.key.width // self.key.group

    @property
    def head_bundle(self) -> int:
        """Heads in a bundle."""
        return math.gcd(max(1, self.chip.mxu // self.dim), self.kv_heads)

    @property
    def bundles(self) -> int:
        return self.kv_heads // self.head_bundle

    @property
    def width(self) -> int:
        """Of the keys of a bundle."""
        return self.head_bundle * self.dim

    @property
    def bundle_channels(self) -> int:
        """Channels of the key stream that a bundle is rebuilt from."""
        return self.key.width if self.dense else self.key.width // self.bundles

    @property
    def head_rows(self) -> int:
        """Queries of a kv head."""
        return self.new * self.heads // self.kv_heads

    @property
    def bundle_rows(self) -> int:
        return self.head_bundle * self.head_rows

    @property
    def padded_rows(self) -> int:
        """The same, whole vector registers."""
        return round_up(self.bundle_rows, SUBLANES)

    @property
    def rows(self) -> int:
        """Queries in all, whole vector registers."""
        return round_up(self.kv_heads * self.head_rows, SUBLANES)

    @property
    def value_lanes(self) -> int:
        """Channels of a tile of the values: as wide as the matrix unit, if every row reads but one of its groups."""
        wide = self.chip.mxu
        head = self.value.width // self.kv_heads
        fits = self.value.width % wide == 0 and self.value_heads == self.kv_heads and self.value.group % head == 0
        return wide if fits else LANES

    @property
    def value_tiles(self) -> int:
        return self.value.width // self.value_lanes

    def readers(self, first: int, last: int) -> tuple[int, int]:
        """Kv heads that read channels `first` to `last` - 1 of the values: the first, and one past the last."""
        if self.value_heads == 1:
            return 0, self.kv_heads
        wide = self.value.width // self.kv_heads
        return first // wide, (last - 1) // wide + 1

    def tile_readers(self, tile: int) -> tuple[int, int]:
        return self.readers(tile * self.value_lanes, (tile + 1) * self.value_lanes)

    @property
    def cover(self) -> int:
        """Rows that are multiplied with a tile of the values: whole registers that hold those of its readers."""
        sizes = []
        for tile in range(self.value_tiles):
            first, last = (self.head_rows * head for head in self.tile_readers(tile))
            sizes.append(round_up(last, SUBLANES) - first // SUBLANES * SUBLANES)
        return max(sizes)

    def cover_start(self, tile: int) -> int:
        start = self.head_rows * self.tile_readers(tile)[0] // SUBLANES * SUBLANES
        return min(start, self.rows - self.cover)


def result_bytes(queries: int, width: int) -> int:
    """Vector memory for what all queries read of the whole value stream: sums, shifts, and the output twice."""
    return 4 * 4 * queries * width


def round_up(n: int, multiple: int) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple
