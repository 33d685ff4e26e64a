"""Runs a call: chooses the backend that takes it, and notes which one that was.

`implementation=None` takes the platform's kernels where they take the call, and always works; a name takes that
backend or raises.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from types import ModuleType

import jax

from pallas_kernels import target, xla
from pallas_kernels.calls import Accumulate, Call, DecodeAttention, Quantize, RematProject
from xquant_jax.errors import ConfigError

OPERATIONS = tuple(call.operation for call in (Accumulate, DecodeAttention, Quantize, RematProject))


@dataclasses.dataclass(frozen=True)
class Backend:
    """What a backend has, known without importing it.

    platform: that it runs on
    kernels: operations it has. Each is a module `pallas_kernels.<backend>.<operation>` with `refuse(call)`, which tells
        from shapes and static fields why it cannot take a call (None: it can), and `run(call)`
    packages: that must be installed
    left_to_xla: operations that XLA runs in its place, and that are recorded as XLA's
    """

    platform: str
    kernels: tuple[str, ...]
    packages: tuple[str, ...] = ()
    left_to_xla: tuple[str, ...] = ()

    def lacks(self, operations: Collection[str]) -> list[str]:
        """Those of `operations` that are neither its kernels nor left to XLA."""
        return [name for name in operations if name not in self.kernels + self.left_to_xla]


BACKENDS = {
    "pallas_gpu": Backend("gpu", kernels=("decode_attention", "remat_project"), left_to_xla=("accumulate", "quantize")),
    "pallas_tpu": Backend("tpu", kernels=OPERATIONS),
    "triton": Backend(
        "gpu",
        kernels=("accumulate", "decode_attention", "remat_project"),
        packages=("jax_triton", "triton"),
        left_to_xla=("quantize",),  # XLA for GPUs fuses the passes over the vectors
    ),
}
"""The backends that have kernels; beside them there is "xla", which runs every operation on every platform."""

CHOSEN = {"gpu": "triton", "tpu": "pallas_tpu"}
"""What `implementation=None` takes on a platform. These kernels agree with the definition on their interpreters, and
compile for the chips that the tests name; neither has ever run on the hardware itself."""

_recorders: ContextVar[tuple[set[str], ...]] = ContextVar("recorders", default=())


def run[Result](call: Call[Result], implementation: str | None = None) -> Result:
    """Runs a call with the backend that is asked for, or the best one that takes it.

    Raises `ConfigError` for shapes that do not fit, and an implementation that does not take them or cannot be had.
    """
    call.check()
    name = choose(call, implementation)
    _record(name)
    with jax.named_scope(call.operation):
        return xla.run(call) if name == "xla" else _module(name, call.operation).run(call)


def choose(call: Call, implementation: str | None = None) -> str:
    """The name of the backend that `run` takes.

    A name that cannot take the call raises `ConfigError`; None warns, once for each reason, where no kernel can.
    """

    def refusal(name: str) -> str | None:
        return _module(name, call.operation).refuse(call)

    return _choose(call.operation, implementation, refusal)


def decode_without_kernel(implementation: str | None, reason: str) -> None:
    """What `run` does about the choice, for decoding that only XLA has a form of: `reason` says why."""
    _record(_choose(DecodeAttention.operation, implementation, lambda name: reason))


def check(implementation: str | None, operations: Collection[str] = OPERATIONS) -> None:
    """Raises `ConfigError` for a name that does not exist, does not run on this device, lacks one of the operations or
    cannot be imported. A cache may take any of them, hence the default."""
    if implementation is None or implementation == "xla":
        return
    here = target.current()
    if implementation not in BACKENDS:
        raise ConfigError(
            f"implementation={implementation!r} is not available; choose None or {sorted([*BACKENDS, 'xla'])}"
        )
    backend = BACKENDS[implementation]
    if backend.platform != here.platform and not here.interpret:
        raise ConfigError(
            f"implementation={implementation!r} runs on {backend.platform}, and this device is a {here.platform}; "
            f"choose None or {_fitting(here.platform, operations)}"
        )
    if lacking := backend.lacks(operations):
        raise ConfigError(
            f"implementation={implementation!r} has kernels for {', '.join(backend.kernels)} only, none for "
            f"{', '.join(lacking)}; choose None or {_fitting(backend.platform, operations)}"
        )
    for operation in backend.kernels:
        _module(implementation, operation)


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    """The names of the backends that this thread takes while the context lasts, that is, while something is traced."""
    names: set[str] = set()
    token = _recorders.set((*_recorders.get(), names))
    try:
        yield names
    finally:
        _recorders.reset(token)


def not_installed(name: str) -> str | None:
    """What a backend needs that is not installed, and the way out; None if it is all there."""
    missing = [package for package in BACKENDS[name].packages if importlib.util.find_spec(package) is None]
    if not missing:
        return None
    return f"needs {' and '.join(missing)}, not installed here; pip install 'xquant-jax[{BACKENDS[name].platform}]'"


def _choose(operation: str, implementation: str | None, refusal: Callable[[str], str | None]) -> str:
    check(implementation, (operation,))
    name = implementation or CHOSEN.get(target.current().platform, "xla")
    if name == "xla" or operation in BACKENDS[name].left_to_xla:
        return "xla"
    reason = _why_unavailable(name, operation) or refusal(name)
    if reason is None:
        return name
    if implementation is not None:
        raise ConfigError(f"implementation={implementation!r} cannot run {operation}: {reason}")
    _warn_once(f"{operation} runs without a kernel, and slower. {name}: {reason}")
    return "xla"


def _why_unavailable(name: str, operation: str) -> str | None:
    try:
        check(name, (operation,))
    except ConfigError as error:
        return str(error)
    return None


def _module(name: str, operation: str) -> ModuleType:
    """The module of a backend's operation. Raises `ConfigError` that says what is not installed, or what is broken."""
    if reason := not_installed(name):
        raise ConfigError(f"implementation={name!r} {reason}")
    try:
        return importlib.import_module(f"pallas_kernels.{name}.{operation}")
    except Exception as error:
        raise ConfigError(
            f"implementation={name!r} cannot be imported, although what it needs is installed: "
            f"{type(error).__name__}: {error}; mend that package, or choose 'xla'"
        ) from error


def _fitting(platform: str, operations: Collection[str]) -> list[str]:
    """The names to choose from on a platform."""
    backends = (n for n, backend in BACKENDS.items() if backend.platform == platform and not backend.lacks(operations))
    return sorted([*backends, "xla"])


def _record(name: str) -> None:
    for names in _recorders.get():
        names.add(name)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
