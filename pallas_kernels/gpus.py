"""What the kernels need to know of a GPU: the one that is there, or one that is compiled for ahead of time."""

import dataclasses

import jax

from pallas_kernels import target


@dataclasses.dataclass(frozen=True)
class Gpu:
    """capability: NVIDIA's compute capability; Ampere's for AMD."""

    capability: float
    multiprocessors: int
    amd: bool = False


AMPERE = Gpu(8.0, 108)
HOPPER = Gpu(9.0, 132)

GPUS = {
    "NVIDIA A100": AMPERE,
    "NVIDIA L40": Gpu(8.9, 142),
    "NVIDIA L4": Gpu(8.9, 58),
    "NVIDIA GeForce RTX 4090": Gpu(8.9, 128),
    "NVIDIA H100": HOPPER,
    "NVIDIA H200": HOPPER,
    "NVIDIA B200": Gpu(10.0, 148),
    "AMD Instinct MI300X": Gpu(8.0, 304, amd=True),
}
"""By how `jax.Device.device_kind` begins, the longer name first: GPUs that may be compiled for without being there. The
numbers are those of NVIDIA's and AMD's data sheets, of the SXM form where there are several."""


def current() -> Gpu:
    """The GPU that is compiled for: the one that `target` names, else the one that is there, else a Hopper.

    One that is named but not known is taken for an Ampere, the least that the kernels run on.
    """
    kind = target.current().device_kind
    if kind is not None:
        named = [known for name, known in GPUS.items() if kind.startswith(name)]
        return named[0] if named else AMPERE
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return HOPPER
    capability = device.compute_capability  # "9.0" on NVIDIA, "gfx942" on AMD
    amd = capability.startswith("gfx")
    return Gpu(AMPERE.capability if amd else float(capability), device.core_count, amd)
