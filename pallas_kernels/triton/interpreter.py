"""Runs the Triton kernels on Triton's interpreter, program by program on numpy arrays.

Nothing but a CPU is needed, and no PyTorch.
"""

import contextlib
import functools
import importlib.util
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

from pallas_kernels.triton.kernels import MODULES

_one_at_a_time = threading.Lock()  # the interpreter patches triton.language while it runs


def interpret(
    kernel: str,
    *inputs: Any,
    grid: tuple[int, ...],
    outputs: Sequence[jax.ShapeDtypeStruct],
    updates: int = 0,
    **constants: Any,
) -> tuple[np.ndarray, ...]:
    """Runs a kernel on numpy arrays; the first `updates` outputs begin as the last inputs, others as NaN or -1."""
    given = len(inputs) - updates
    arrays = [np.ascontiguousarray(a) for a in inputs[:given]]
    results = [np.array(a, order="C") for a in inputs[given:]]
    results += [
        np.full(o.shape, -1 if np.issubdtype(o.dtype, np.integer) else np.nan, o.dtype) for o in outputs[updates:]
    ]
    with _one_at_a_time, _interpreted_language():
        _interpreted_kernels()[kernel][grid](*map(_Tensor, arrays + results), **constants)
    return tuple(results)


@contextlib.contextmanager
def _interpreted_language() -> Iterator[None]:
    """`triton.language` as the interpreter needs it, and then as it was.

    By itself the interpreter patches it anew in every call of a function, and leaves it so: nothing could be compiled.
    """
    reductions: dict[str, Any] = {
        name: interpreter.InterpretedFunction(getattr(tl, name).fn) for name in ("cumsum", "max", "min", "sum")
    }
    patch, scopes = interpreter._patch_lang, {}

    def patch_once(function: Any) -> Any:
        modules = tuple(sorted({value.__name__ for value in function.__globals__.values() if value in (tl, tl.core)}))
        if modules not in scopes:
            scopes[modules] = patch(function)
            # Triton 3.6 makes a number of an array of one, which numpy 2.5 refuses
            setattr(tl.tensor, "__index__", lambda tensor: tensor.handle.data.item())  # noqa: B010
        return types.SimpleNamespace(restore=lambda: None)  # what the interpreter believes to be the way back

    with _replaced(tl, **reductions), _replaced(interpreter, _patch_lang=patch_once):
        try:
            yield
        finally:
            for scope in reversed(scopes.values()):
                scope.restore()


@contextlib.contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Sets attributes, and sets them back."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@functools.cache
def _interpreted_kernels() -> dict[str, Any]:
    """A second copy of the kernels by name, whose functions all run on the interpreter."""
    found: dict[str, Any] = {}
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        try:
            for module in MODULES:
                spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
                assert spec is not None
                assert spec.loader is not None
                sys.modules[module.__name__] = copy = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(copy)  # which imports from the copies before it
                found |= vars(copy)
        finally:
            sys.modules.update({module.__name__: module for module in MODULES})
    return found


class _Tensor:
    """What the interpreter asks of a torch tensor, for a numpy array that is its own storage and its own copy."""

    def __init__(self, array: np.ndarray) -> None:
        self.dtype = array.dtype
        self._array = array

    def data_ptr(self) -> int:
        return self._array.ctypes.data

    def untyped_storage(self) -> "_Tensor":
        return self

    def cpu(self) -> "_Tensor":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "_Tensor":
        return self

    def set_(self, *_: Any) -> None: ...

    def copy_(self, *_: Any) -> None: ...

    def size(self) -> tuple[int, ...]:
        return self._array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self._array.itemsize for s in self._array.strides)

    def storage_offset(self) -> int:
        return 0
