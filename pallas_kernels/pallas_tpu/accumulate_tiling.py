"""How `accumulate` cuts its work: the sizes that one call's kernel is built from."""

import dataclasses
import math

from pallas_kernels import chips
from pallas_kernels.calls import Accumulate
from pallas_kernels.pallas_tpu import chip
from pallas_kernels.pallas_tpu.streams import LANES
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import StreamSpec

TILE, LEAST_TILE = 16, 8
"""Blocks of a step of the grid, and where that takes more than half of the vector memory."""
AT_ONCE = 2**16
"""Values of the sum that are worked on together: with more, more registers spill than products hide."""


@dataclasses.dataclass(frozen=True)
class SumTiling:
    """The static side of a call, and the sizes that follow from it."""

    stream: StreamSpec
    sum: StreamSpec
    num_blocks: int
    predict: tuple[tuple[int, int], ...] | None  # shapes of the matrices
    lift: tuple[int, int] | None
    chip: chips.TPU

    @classmethod
    def of(cls, call: Accumulate) -> "SumTiling":
        predict, lift = call.accumulation.predict, call.accumulation.lift
        return cls(
            stream=call.stream.spec,
            sum=call.running_sum.spec,
            num_blocks=call.running_sum.planes[0].shape[1],
            predict=None if predict is None else tuple(matrix.shape for matrix in predict),
            lift=None if lift is None else lift.shape,
            chip=chip.current(),
        )

    @property
    def tile(self) -> int:
        return min(TILE if self._bytes(TILE) <= self.chip.vmem // 2 else LEAST_TILE, self.num_blocks)

    @property
    def chunk(self) -> int:
        """Blocks of a tile that are worked on together."""
        return math.gcd(self._at_once, self.tile)

    @property
    def _at_once(self) -> int:
        return AT_ONCE // (BLOCK * self.strip)

    @property
    def strip(self) -> int:
        """Channels of the sum that are worked on together."""
        return self.chip.mxu if self.sum.width % self.chip.mxu == 0 else LANES

    @property
    def left(self) -> dict[str, int]:
        """What is multiplied with a matrix, and how wide it is: `sum`, `between0` ..., `stored`."""
        widths = {}
        for number, (width, _) in enumerate(self.predict or ()):
            widths["sum" if number == 0 else f"between{number - 1}"] = width
        if self.lift is not None:
            widths["stored"] = self.lift[0]
        return widths

    @property
    def bytes(self) -> int:
        """Of vector memory: matrices, left operands, words of a step and of the next, as they come and as they go."""
        return self._bytes(self.tile)

    def _bytes(self, tile: int) -> int:
        matrices = [*(self.predict or ()), *([self.lift] if self.lift else [])]
        words = BLOCK * (self.stream.width * self.stream.bits + 2 * self.sum.width * self.sum.bits) // 8
        scales = 3 * 8 * self.sum.width
        return (
            sum(2 * a * b for a, b in matrices)
            + 2 * self._at_once * BLOCK * sum(self.left.values())
            + 2 * tile * (words + scales)
        )
