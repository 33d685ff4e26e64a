"""Calls a Triton kernel: through jax-triton on a GPU, or on Triton's interpreter where the target says so."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax_triton
from jax.interpreters import partial_eval
from jax_triton import triton_lib
from jaxtyping import Array

from pallas_kernels import gpus, target
from pallas_kernels.triton.interpreter import interpret
from pallas_kernels.triton.kernels import find

PTX_VERSION = 87
"""Of NVIDIA's assembly: JAX assembles it with its own CUDA (12.8 or newer), and Triton's may be newer."""

_NEW_CALL = "out_type" in inspect.signature(jax_triton.triton_call).parameters  # jax-triton 0.4; 0.3 says out_shape
CAN_UPDATE = _NEW_CALL
"""Whether kernels can update arrays in place: jax-triton 0.3 has another way to do so, with other arguments."""


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
        options = {"backend_options": options if gpus.current().amd else options | {"ptx_version": PTX_VERSION}}
    _mend_dead_code_rule()
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


@functools.cache
def _mend_dead_code_rule() -> None:
    """jax-triton 0.4.1's rule, that a kernel is never dead code, takes two arguments, and JAX 0.12 calls it with three:
    the same rule in its place, for either. It is needed as long as compiled programs are, so nothing sets it back."""

    def keep(used_outputs: Any, *rest: Any) -> Any:
        equation = rest[-1]
        return [True] * len(equation.invars), equation

    partial_eval.dce_rules[triton_lib.triton_kernel_call_p] = keep
