"""What kernels are chosen and compiled for: the platform of the default device, unless a context says otherwise.

The context is part of the key of jit's caches, so the same function may be compiled for several targets.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """platform: "cpu", "gpu" or "tpu". interpret: whether kernels run on their interpreter, on any device.

    device_kind: as `jax.Device.device_kind` has it ("TPU v5 lite"); None: that of the default device.
    """

    platform: str
    interpret: bool = False
    device_kind: str | None = None


_told = jax.make_user_context(default_value=None)


def current() -> Target:
    """What this thread compiles for."""
    return _told.value or Target(jax.default_backend())


@contextlib.contextmanager
def compiling_for(platform: str, device_kind: str | None = None) -> Iterator[None]:
    """Chooses kernels of a platform whose devices need not be there, for compiling ahead of time."""
    with _told(dataclasses.replace(current(), platform=platform, device_kind=device_kind)):
        yield


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs kernels on their interpreters: any backend may be asked for by name on any device, for tests."""
    with _told(dataclasses.replace(current(), interpret=True)):
        yield
