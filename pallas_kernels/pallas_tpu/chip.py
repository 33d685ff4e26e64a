"""What the kernels need to know of a TPU generation, and the little that differs between versions of Pallas."""

import dataclasses

import jax

from pallas_kernels import target


@dataclasses.dataclass(frozen=True)
class Chip:
    """mxu: rows and columns of a matrix unit. bf16_alu: whether the vector unit computes in bfloat16. eight_bits: what
    the matrix unit multiplies twice as fast, a name of `eight_bits.TYPES`, if anything.

    vmem: bytes of vector memory of a core. cores: those that share the chip's work (megacore).
    """

    mxu: int
    bf16_alu: bool
    vmem: int
    cores: int = 1
    eight_bits: str | None = "int8"


V5E = Chip(mxu=128, bf16_alu=False, vmem=128 * 2**20)
V5P = Chip(mxu=128, bf16_alu=False, vmem=64 * 2**20, cores=2)
V6E = Chip(mxu=256, bf16_alu=True, vmem=128 * 2**20)
V7X = Chip(mxu=256, bf16_alu=True, vmem=64 * 2**20, eight_bits="fp8")  # each core is a device

UNKNOWN = dataclasses.replace(V5E, vmem=64 * 2**20, eight_bits=None)

CHIPS = {
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU7x": V7X,
}


def current() -> Chip:
    """The chip that is compiled for. One that is not known is taken for a v5e, the least of them, without what newer
    ones have dropped; none is taken for a v5e."""
    here = target.current()
    kind = here.device_kind
    if kind is None and not here.interpret and jax.default_backend() == "tpu":
        kind = jax.devices()[0].device_kind
    return CHIPS.get(kind, UNKNOWN) if kind else V5E
