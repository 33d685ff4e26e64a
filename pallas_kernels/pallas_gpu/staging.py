"""How blocks of a stream are copied to shared memory ahead of their use."""

# Pallas does not annotate its transforms.
# pyright: reportAbstractUsage=false

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.pallas_gpu import warpgroup
from xquant_jax.numerics.packing import BLOCK, PLANES
from xquant_jax.numerics.quantization import StreamSpec

STAGES = 4
"""Blocks that may be in shared memory at once; even, so that each of them is always the same consumer's."""

GROUPS = 8
"""Groups of channels whose scales are copied at once: 16 bytes of a token."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """How one kv head's part of a stream's blocks is copied: `heads` such parts lie side by side."""

    spec: StreamSpec
    heads: int

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.spec.width // self.heads

    @property
    def groups(self) -> int:
        """Groups of channels of a token."""
        return self.spec.width // self.spec.group

    def refuse(self) -> str | None:
        """Why scales cannot be copied so; None if they can."""
        if self.spec.axis == "token" and self.groups % GROUPS and self.groups > GROUPS:
            return f"{self.groups} groups of channels are not taken; up to {GROUPS} and multiples of {GROUPS} are"
        return None

    @property
    def scales(self) -> tuple[int, int]:
        """Of a block: what is copied of its scales. All groups of its tokens, in rows of 64, where they are few."""
        if self.spec.axis == "channel":
            return 1, self.width
        return (2 * self.groups, 64) if self.groups % GROUPS else (BLOCK, GROUPS)

    def arrays(self, words: Any, scale: Any, zero: Any) -> list[Array]:
        """As `scratch` and `copies` have them: rows of all blocks."""
        rows = self.spec.width if self.spec.axis == "channel" else 64 if self.groups % GROUPS else self.groups
        return [*(w.reshape(-1, w.shape[-1]) for w in words), scale.reshape(-1, rows), zero.reshape(-1, rows)]

    def scratch(self) -> list[Any]:
        """Shared memory for `STAGES` blocks."""
        planes = PLANES[self.spec.bits]
        words = [
            plgpu.SMEM((STAGES, 4 * p, self.width), jnp.uint32, transforms=warpgroup.words_transforms(p))
            for p in planes
        ]
        return [*words, *[plgpu.SMEM((STAGES, *self.scales), jnp.bfloat16)] * 2]

    def copies(self, sources: list[Any], block: Any, head: Any) -> list[Any]:
        """A head's part of one block, of all arrays."""
        *words, scale, zero = sources
        channels = pl.ds(head * self.width, self.width)
        rows, columns = self.scales
        across = pl.ds(0, columns)
        if self.spec.axis == "channel":
            across = channels
        elif rows == BLOCK:
            across = pl.ds(self.group(head) // GROUPS * GROUPS, GROUPS)
        planes = zip(PLANES[self.spec.bits], words, strict=True)
        return [
            *(w.at[pl.ds(block * 4 * p, 4 * p), channels] for p, w in planes),
            *(a.at[pl.ds(block * rows, rows), across] for a in (scale, zero)),
        ]

    def group(self, head: Any) -> Any:
        """A head's group along the token."""
        return lax.div(head * self.width, self.spec.group)

    def copied_group(self, head: Any) -> Any:
        """Its number among those that are copied."""
        group = self.group(head)
        return group if self.groups % GROUPS else lax.rem(group, GROUPS)
