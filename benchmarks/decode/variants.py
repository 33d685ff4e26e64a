"""Other tiles than the rule's for the kernels that read keys or add to sums, while something is traced."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from pallas_kernels.triton import tiling
from pallas_kernels.triton.tiling import Tiles


@contextlib.contextmanager
def chosen(kernel: str, change: Callable[[Tiles], Tiles]) -> Iterator[None]:
    """Tiles of a kernel are what `change` makes of the rule's while this lasts; those of other kernels stay."""
    rule = tiling.choose

    def choose(shape: tiling.Shape) -> Tiles:
        return change(rule(shape)) if shape.kernel == kernel else rule(shape)

    tiling.choose = choose
    try:
        yield
    finally:
        tiling.choose = rule


def named(variant: str) -> Callable[[Tiles], Tiles]:
    """What "fused=0,warps=8" changes; nothing if it is empty."""
    changes = dict(part.split("=") for part in variant.split(",") if part)
    return lambda tiles: dataclasses.replace(tiles, **{name: int(value) for name, value in changes.items()})
