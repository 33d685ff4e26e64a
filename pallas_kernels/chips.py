"""What accelerators are, as far as kernels and what they cost depend on it.

How fast a chip is at its best and how much memory it has is for `xquant_jax/planning/devices.json` to say, by the same
names.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TPU:
    """A generation of TPUs, as one of its devices.

    kinds: what `jax.Device.device_kind` may call it
    topology: its smallest slice, by libtpu's name
    mxu: rows and columns of a matrix unit, of which a core has four
    bf16_alu: whether the vector unit computes in bfloat16
    vmem: bytes of vector memory of a core
    clock: cycles per second
    usable: GiB of a device's memory that programs can use, as the compiler states it when one does not fit
    cores: those that share the device's work (megacore)
    eight_bits: what the matrix unit multiplies twice as fast, a name of `eight_bits.TYPES`, if anything
    """

    kinds: tuple[str, ...]
    topology: str
    mxu: int
    bf16_alu: bool
    vmem: int
    clock: float
    usable: float
    cores: int = 1
    eight_bits: str | None = "int8"

    @property
    def macs(self) -> int:
        """Multiply-adds of a core in a cycle, in bfloat16."""
        return 4 * self.mxu * self.mxu

    @property
    def mxus(self) -> int:
        """Matrix units of a core as the compiler addresses them: two of the large ones are one."""
        return 4 if self.mxu == 128 else 2


TPUS = {
    "v5e": TPU(("TPU v5 lite", "TPU v5e"), "v5e:2x2", 128, False, 128 * 2**20, 1.5e9, 15.75),
    "v5p": TPU(("TPU v5", "TPU v5p"), "v5p:2x2x1", 128, False, 64 * 2**20, 1.75e9, 95.74, cores=2),
    "v6e": TPU(("TPU v6 lite", "TPU v6e"), "v6e:2x2", 256, True, 128 * 2**20, 1.75e9, 31.25),  # an assumed clock
    # each core is a device; an assumed clock
    "v7x": TPU(("TPU7x",), "tpu7x:2x2x1", 256, True, 64 * 2**20, 2.2e9, 94.74, eight_bits="fp8"),
}

UNKNOWN_TPU = dataclasses.replace(TPUS["v5e"], kinds=(), vmem=64 * 2**20, eight_bits=None)
"""The least of them, without what newer ones have dropped."""


@dataclasses.dataclass(frozen=True)
class GPU:
    """A kind of GPUs, by the data sheets of NVIDIA and AMD; of the SXM form where there are several.

    kind: how `jax.Device.device_kind` begins
    architecture: what Triton compiles for, "9.0" (NVIDIA's compute capability) or "gfx942"
    multiprocessors: how many it has; compute units of AMD
    matrix: bfloat16 multiply-adds of a multiprocessor in a cycle
    clock: cycles per second; under load it varies
    sustained: bytes per second that its memory is taken to reach, nine tenths of its peak
    """

    kind: str
    architecture: str
    multiprocessors: int
    matrix: int
    clock: float
    sustained: float

    @property
    def amd(self) -> bool:
        return self.architecture.startswith("gfx")

    @property
    def capability(self) -> float:
        """NVIDIA's compute capability; Ampere's for AMD."""
        return 8.0 if self.amd else float(self.architecture)


GPUS = {
    "A100": GPU("NVIDIA A100", "8.0", 108, 1024, 1.41e9, 1.8e12),
    "L40S": GPU("NVIDIA L40", "8.9", 142, 512, 2.52e9, 0.78e12),
    "L4": GPU("NVIDIA L4", "8.9", 58, 512, 2.04e9, 0.27e12),
    "RTX 4090": GPU("NVIDIA GeForce RTX 4090", "8.9", 128, 256, 2.52e9, 0.9e12),
    "H100": GPU("NVIDIA H100", "9.0", 132, 2048, 1.755e9, 3.0e12),
    "H200": GPU("NVIDIA H200", "9.0", 132, 2048, 1.755e9, 4.3e12),
    "B200": GPU("NVIDIA B200", "10.0", 148, 4096, 1.85e9, 7.2e12),
    "MI300X": GPU("AMD Instinct MI300X", "gfx942", 304, 1024, 2.1e9, 4.8e12),
}


def tpu(kind: str) -> TPU:
    """The TPU of this `jax.Device.device_kind`; `UNKNOWN_TPU` if none is known by it."""
    return next((chip for chip in TPUS.values() if kind in chip.kinds), UNKNOWN_TPU)


def gpu(kind: str) -> GPU:
    """The GPU of this `jax.Device.device_kind`; an A100, the least that the kernels run on, if none is known by it."""
    return next((chip for chip in GPUS.values() if kind.startswith(chip.kind)), GPUS["A100"])
