"""Calls a Triton kernel: through jax-triton on a GPU, or on Triton's interpreter where the target says so.

The interpreter runs a kernel program by program on numpy arrays; nothing but a CPU is needed, and no PyTorch.
"""

import contextlib
import functools
import importlib.util
import inspect
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax_triton
import numpy as np
import triton.language as tl
from jax.interpreters import partial_eval
from jax_triton import triton_lib
from jaxtyping import Array
from triton import knobs
from triton.runtime import interpreter

from pallas_kernels import target
from pallas_kernels.triton import tiling
from pallas_kernels.triton.kernels import accumulate, codes, decode_attention, keys, remat_project

MODULES = (codes, keys, decode_attention, remat_project, accumulate)
"""Where the kernels are; later ones import from earlier ones."""

PTX_VERSION = 87
"""Of NVIDIA's assembly: JAX assembles it with its own CUDA (12.8 or newer), and Triton's may be newer."""

_NEW_CALL = "out_type" in inspect.signature(jax_triton.triton_call).parameters  # jax-triton 0.4; 0.3 says out_shape
CAN_UPDATE = _NEW_CALL
"""Whether kernels can update arrays in place: jax-triton 0.3 has another way to do so, with other arguments."""
# jax-triton 0.4.1 registers a rule for dead code that jax 0.12 calls with an argument too many. The default rule is
# right for kernels without effects: one whose outputs nobody uses may go.
partial_eval.dce_rules.pop(triton_lib.triton_kernel_call_p, None)
_one_at_a_time = threading.Lock()  # the interpreter patches triton.language while it runs


def run(
    kernel: str,
    *inputs: Array,
    grid: tuple[int] | tuple[int, int] | tuple[int, int, int],
    outputs: Sequence[jax.ShapeDtypeStruct] = (),
    updated: Sequence[Array] = (),
    warps: int,
    stages: int,
    **constants: Any,
) -> list[Array]:
    """What a kernel writes: either outputs, or arrays that it also reads, which are `updated` in place.

    Its arguments are the inputs, then what it writes, then the constants.
    """
    if target.current().interpret:
        shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*updated, *outputs))
        run = functools.partial(interpret, kernel, grid=grid, outputs=shapes, updates=len(updated), **constants)
        return list(jax.pure_callback(run, shapes, *inputs, *updated))
    # contraction to fma is what makes scale and zero one instruction for two elements
    options: dict[str, Any] = {"enable_fp_fusion": True}
    if _NEW_CALL:
        options = {"backend_options": options if tiling.is_amd() else options | {"ptx_version": PTX_VERSION}}
    refs = [jax.new_ref(a) for a in updated]
    written = jax_triton.triton_call(
        *inputs,
        *refs,
        kernel=find(kernel),
        grid=grid,
        num_warps=warps,
        num_stages=stages,
        **{"out_type" if _NEW_CALL else "out_shape": list(outputs)},
        **options,
        **constants,
    )
    return [jax.freeze(ref) for ref in refs] if refs else written


def find(kernel: str) -> Any:
    """The kernel of this name."""
    return next(getattr(module, kernel) for module in MODULES if hasattr(module, kernel))


def interpret(
    kernel: str,
    *inputs: Any,
    grid: tuple[int, ...],
    outputs: Sequence[jax.ShapeDtypeStruct],
    updates: int = 0,
    **constants: Any,
) -> tuple[np.ndarray, ...]:
    """Runs a kernel on numpy arrays; the first `updates` outputs begin as the last inputs, others as NaN."""
    given = len(inputs) - updates
    arrays = [np.ascontiguousarray(a) for a in inputs[:given]]
    results = [np.array(a, order="C") for a in inputs[given:]]
    results += [np.full(o.shape, np.nan, o.dtype) for o in outputs[updates:]]
    with _one_at_a_time, _interpreted_language():
        _interpreted_kernels()[kernel][grid](*map(_Tensor, arrays + results), **constants)
    return tuple(results)


@contextlib.contextmanager
def _interpreted_language() -> Iterator[None]:
    """`triton.language` as the interpreter needs it, and then as it was.

    By itself the interpreter patches it anew in every call of a function, and leaves it so: nothing could be compiled.
    """
    reductions: dict[str, Any] = {
        name: interpreter.InterpretedFunction(getattr(tl, name).fn) for name in ("max", "min", "sum")
    }
    patch, scopes = interpreter._patch_lang, {}

    def patch_once(function: Any) -> Any:
        modules = tuple(sorted({value.__name__ for value in function.__globals__.values() if value in (tl, tl.core)}))
        if modules not in scopes:
            scopes[modules] = patch(function)
        return mock.Mock()  # what the interpreter believes to be the way back

    with mock.patch.multiple(tl, **reductions), mock.patch.object(interpreter, "_patch_lang", patch_once):
        try:
            yield
        finally:
            for scope in reversed(scopes.values()):
                scope.restore()


@functools.cache
def _interpreted_kernels() -> dict[str, Any]:
    """A second copy of the kernels by name, whose functions all run on the interpreter."""
    found: dict[str, Any] = {}
    with mock.patch.object(knobs.runtime, "interpret", True):
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
