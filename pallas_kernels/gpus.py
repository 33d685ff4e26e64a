"""Which GPU the kernels are compiled for."""

import dataclasses

import jax

from pallas_kernels import chips, target
from pallas_kernels.chips import GPU


def current() -> GPU:
    """The GPU that is compiled for: the one that `target` names, else the one that is there, else an H200.

    One that is named but not known is taken for an A100.
    """
    if kind := target.current().device_kind:
        return chips.gpu(kind)
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return chips.GPUS["H200"]
    known = chips.gpu(device.device_kind)
    return dataclasses.replace(known, architecture=device.compute_capability, multiprocessors=device.core_count)
