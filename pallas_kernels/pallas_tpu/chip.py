"""Which TPU the kernels are compiled for."""

import jax

from pallas_kernels import chips, target
from pallas_kernels.chips import TPU


def current() -> TPU:
    """The chip that is compiled for. One that is not known is taken for the least of them; none is taken for a v5e."""
    here = target.current()
    kind = here.device_kind
    if kind is None and not here.interpret and jax.default_backend() == "tpu":
        kind = jax.devices()[0].device_kind
    return chips.tpu(kind) if kind else chips.TPUS["v5e"]
