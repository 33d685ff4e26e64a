"""The public operations: they check what they are given and choose the backend.

`implementation=None` takes the best that the device supports and always works; a name takes that backend or raises.
"""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import target, xla
from pallas_kernels.operands import Accumulation, KeyRebuild
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.attention import Geometry, Part
from xquant_jax.numerics.quantization import UNQUANTIZED, Blocks, StreamSpec

BACKENDS = {"pallas_gpu": "gpu", "pallas_tpu": "tpu", "triton": "gpu", "xla": None}
"""The platform that each runs on; None: all. Each is a module of this package, imported when it is first chosen.

A module has some of the operations, with the signatures of `pallas_kernels.xla`, and for each of them a function
`refuse_<operation>` of the same arguments: why it cannot take them, or None. It looks at shapes and static fields only.
"""

CHOSEN = {"gpu": ("triton",), "tpu": ("pallas_tpu",)}
"""What `implementation=None` tries, in this order, before the reference: kernels that were seen to be right."""

_recorded: list[set[str]] = []


def check(implementation: str | None) -> None:
    """Raises `ConfigError` for a name that does not exist or does not run on this device."""
    here = target.current()
    if implementation is None:
        return
    if implementation not in BACKENDS:
        raise ConfigError(f"implementation={implementation!r} is not available; choose None or {sorted(BACKENDS)}")
    platform = BACKENDS[implementation]
    if platform not in (None, here.platform) and not here.interpret:
        fitting = sorted(name for name, where in BACKENDS.items() if where in (None, here.platform))
        raise ConfigError(
            f"implementation={implementation!r} runs on {platform}, and this device is a {here.platform}; "
            f"choose None or {fitting}"
        )
    try:
        _module(implementation)
    except ImportError as error:
        raise ConfigError(f"implementation={implementation!r} {_missing(error, platform)}") from error


def choose(implementation: str | None, operation: str, *args: Any, **kwargs: Any) -> str:
    """The backend that takes these arguments of an operation.

    A name raises `ConfigError` if it cannot; None warns, once for each reason, if no kernel of this platform can.
    """
    return _choose(implementation, operation, lambda name: _refusal(name, operation, *args, **kwargs))


def decode_without_kernel(implementation: str | None, reason: str) -> None:
    """What `choose` does, for decoding that no backend but plain XLA has a form of: `reason` says why."""
    name = _choose(implementation, "decode_attention", lambda name: None if name == "xla" else reason)
    for names in _recorded:
        names.add(name)


def _choose(implementation: str | None, operation: str, refusal: Callable[[str], str | None]) -> str:
    check(implementation)
    if implementation is not None:
        if reason := refusal(implementation):
            raise ConfigError(f"implementation={implementation!r} cannot run {operation}: {reason}")
        return implementation
    reasons = []
    for name in CHOSEN.get(target.current().platform, ()):
        if (reason := refusal(name)) is None:
            return name
        reasons.append(f"{name}: {reason}")
    if reasons:
        _warn_once(f"{operation} runs without a kernel, and slower. {'; '.join(reasons)}")
    return "xla"


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    """The names of the backends that are chosen while this context lasts, that is, while something is traced."""
    _recorded.append(names := set())
    try:
        yield names
    finally:
        _recorded.pop()


def remat_project(
    stream: Blocks, weight: Float[Array, "C N"], *, dtype: Any = None, implementation: str | None = None
) -> Float[Array, "B S N"]:
    """Rematerializes x^ W from the history blocks [B, N, ...] of one layer (paper, section 3.1).

    dtype: of the result, which is summed in float32; by default the weight's

    Raises `ConfigError` if the widths differ or the implementation cannot be had.
    """
    if stream.spec.width != weight.shape[0]:
        raise ConfigError(f"a stream of width {stream.spec.width} cannot be multiplied by a {weight.shape} weight")
    backend = _backend(implementation, "remat_project", stream, weight, dtype=dtype)
    return backend.remat_project(stream, weight, dtype=dtype)


def decode_attention(
    q: Float[Array, "B T H d"],
    key_stream: Blocks,
    key_rebuild: KeyRebuild,
    value_stream: Blocks,
    history_blocks: Int[Array, " B"],
    geometry: Geometry,
    *,
    layer: Int[Array, ""] | int,
    num_kv_heads: int,
    value_heads: int,
    implementation: str | None = None,
) -> Part:
    """Attention of a few new queries to one layer of quantized history, keys rebuilt and values absorbed.

    q: queries, before RoPE unless `geometry.rotated`
    key_stream, value_stream: history of all layers, unsliced, leading axes [L, B, N]; may be the same array
    flushed: whole blocks of each sequence that exist; the rest is neither read nor attended to
    layer: which layer of the streams
    value_heads: K if the value stream holds each kv head's part side by side, 1 if all heads read the whole of it

    Returns attention in the value stream's space, C wide per query head: o_h = p_h z^ (the caller multiplies by
    the value rebuild matrix of head h), with the log-sum-exp. Raises `ConfigError` for shapes that do not fit.
    """
    if q.shape[2] % num_kv_heads:
        raise ConfigError(f"{q.shape[2]} query heads cannot share {num_kv_heads} key/value heads evenly")
    if value_stream.spec.width % value_heads:
        raise ConfigError(f"a value stream of width {value_stream.spec.width} cannot be split into {value_heads} heads")
    args = (q, key_stream, key_rebuild, value_stream, history_blocks, geometry)
    kwargs = {"layer": layer, "num_kv_heads": num_kv_heads, "value_heads": value_heads}
    return _backend(implementation, "decode_attention", *args, **kwargs).decode_attention(*args, **kwargs)


def accumulate(
    running_sum: Blocks,
    stream: Blocks,
    accumulation: Accumulation,
    history_blocks: Int[Array, " B"],
    *,
    layer: Int[Array, ""] | int,
    implementation: str | None = None,
) -> Blocks:
    """The running sum of the history with one layer in it (paper, section 3.3): read, added to, quantized again.

    running: the sum of the layers below [B, N, ...], along the token; ignored where `accumulation.predict` is None
    stream: what the layers store, of all layers, unsliced, leading axes [L, B, N]
    flushed: whole blocks of each sequence that exist; what the others hold afterwards means nothing
    layer: which layer of the stream

    Raises `ConfigError` if the widths differ or the implementation cannot be had.
    """
    widths = [stream.spec.width if accumulation.lift is None else accumulation.lift.shape[1]]
    widths += [matrix.shape[1] for matrix in (accumulation.predict or ())[-1:]]
    if any(width != running_sum.spec.width for width in widths):
        raise ConfigError(f"a sum of width {running_sum.spec.width} cannot be had from parts of width {widths}")
    args, kwargs = (running_sum, stream, accumulation, history_blocks), {"layer": layer}
    return _backend(implementation, "accumulate", *args, **kwargs).accumulate(*args, **kwargs)


def quantize(
    x: Float[Array, "B n 128 C"],
    spec: StreamSpec,
    codebook: Float[Array, " levels"] | None = None,
    *,
    implementation: str | None = None,
) -> Blocks:
    """Quantizes and packs whole blocks of a stream, as `xquant_jax.numerics.quantization.quantize` defines it.

    Vectors in bfloat16 have the same scales and zeros from a kernel, and the same codes but where a value lies half way
    between two. `codebook`: levels, for a stream of that format.

    Raises `ConfigError` if the implementation cannot be had.
    """
    if spec.bits == UNQUANTIZED:
        return xla.quantize(x, spec)
    backend = _backend(implementation, "quantize", x, spec, codebook)
    with jax.named_scope("quantize"):
        return backend.quantize(x, spec, codebook)


def _backend(implementation: str | None, operation: str, *args: Any, **kwargs: Any) -> ModuleType:
    name = choose(implementation, operation, *args, **kwargs)
    for names in _recorded:
        names.add(name)
    return _module(name)


def _module(name: str) -> ModuleType:
    return xla if name == "xla" else importlib.import_module(f"pallas_kernels.{name}")


def _refusal(name: str, operation: str, *args: Any, **kwargs: Any) -> str | None:
    if name == "xla":
        return None
    try:
        module = _module(name)
    except ImportError as error:
        return _missing(error, BACKENDS[name])
    refuse = getattr(module, f"refuse_{operation}", None)
    return refuse(*args, **kwargs) if refuse else "it has no such kernel"


def _missing(error: ImportError, platform: str | None) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"needs {error.name}, which is not installed; pip install 'xquant-jax[{platform}]'"
    return f"cannot be imported: {str(error).splitlines()[0]}"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
