"""Which streams kernels unpack: one rule for all backends, which differ in how many channels they read at once."""

from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import UNQUANTIZED, StreamSpec


def refuse_stream(which: str, spec: StreamSpec, at_once: int) -> str | None:
    """Why a kernel that reads `at_once` channels at a time cannot unpack a stream; None if it can.

    A group must hold all channels that are read at once, or be one channel's part of a block.

    which: what the reason calls the stream
    """
    if spec.bits == UNQUANTIZED:
        return f"{which} is not quantized"
    if spec.format != "uniform":
        return f"{which} has format {spec.format}; it takes uniform"
    if spec.outliers:
        return f"{which} keeps outliers; it takes streams without"
    if spec.width % at_once:
        return f"{which} is {spec.width} wide; it takes multiples of {at_once}"
    if spec.axis == "channel" and spec.group != BLOCK:
        return f"{which} has groups of {spec.group} tokens; it takes whole blocks of {BLOCK}"
    if spec.axis == "token" and spec.group % at_once:
        fitting = [size for size in range(at_once, spec.width + 1, at_once) if spec.width % size == 0]
        way_out = max((size for size in fitting if size <= BLOCK), default=fitting[0])
        return f"{which} has groups of {spec.group} channels; it takes multiples of {at_once}: choose group={way_out}"
    return None
