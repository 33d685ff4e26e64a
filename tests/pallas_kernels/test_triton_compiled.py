"""The Triton kernels through the real compiler, at the sizes of real models: their machine code, without a GPU."""

import importlib
import re

import pytest

from benchmarks.models import decode_shape, sum_shape
from pallas_kernels.chips import GPUS

pytest.importorskip("jax_triton", reason="jax-triton is not installed; it is on Linux only")
ahead = importlib.import_module("benchmarks.static.triton_ahead")

NVIDIA = ("A100", "L40S", "H200")
SUMS = [
    ("Llama-3.1-8B", ""),
    ("Llama-3.1-8B", ",rank=512"),
    ("Llama-3.1-8B", ",predict=paper"),
    ("Llama-2-7B", ""),
]
SHARED = 100_000
"""Bytes of shared memory that a program may have on Ada, the least of the three."""


def on_two_of_three(forms: list[tuple[str, str]], bits: tuple[int, int, int]) -> list[tuple[str, str, int, str]]:
    """Every form for Hopper, and for one of the two before it; numbers of bits in turn."""
    gpus = [(form, NVIDIA[i % 2], bits[(i + 1) % 3]) for i, form in enumerate(forms)]
    return [(*form, bits[i % 3], "H200") for i, form in enumerate(forms)] + [(*form, b, gpu) for form, gpu, b in gpus]


def has_products(gpu: str, operations: dict[str, int]) -> bool:
    """Whether the matrix unit is used as the GPU's generation should."""
    return operations["HGMMA" if gpu == "H200" else "HMMA"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options", "bits", "gpu"),
    on_two_of_three(
        [("Llama-3.1-8B", ""), ("Llama-3.1-8B", ",basis=joint"), ("Llama-2-7B", ""), ("Qwen3-8B", "")], (2, 3, 4)
    ),
)
def test_the_innermost_loops_do_not_spill(model: str, options: str, bits: int, gpu: str) -> None:
    for launch in ahead.decode_launches(decode_shape(model, f"xquant:{bits}{options}"), GPUS[gpu]):
        machine = ahead.compiled(launch, GPUS[gpu])
        assert machine.loops[0].spills == 0, launch.kernel
        assert has_products(gpu, machine.loops[0].operations), launch.kernel
        assert machine.shared < SHARED, launch.kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options", "bits", "gpu"),
    on_two_of_three(SUMS, (2, 3, 8)),  # bits of one plane, of two, the widest words
)
def test_kernels_of_sums_do_not_spill(model: str, options: str, bits: int, gpu: str) -> None:
    for launch in ahead.sum_launches(sum_shape(model, f"xquant-cl:{bits}{options}"), GPUS[gpu]):
        machine = ahead.compiled(launch, GPUS[gpu])
        assert machine.spills == 0, launch.kernel
        if any(launch.constants.get(product) for product in ("MULTIPLY", "BELOW", "STORED")):
            assert has_products(gpu, machine.loops[0].operations), launch.kernel
        assert machine.shared < SHARED, launch.kernel


@pytest.mark.parametrize(
    ("model", "cache"),
    [
        ("Llama-2-7B", "xquant:3,rebuild_dtype=int8"),
        ("Llama-2-7B", "xquant:4,rebuild_dtype=fp8"),
        ("Llama-3.1-8B", "xquant-cl:2,rebuild_dtype=int8"),
    ],
)
def test_keys_rebuilt_in_eight_bits_take_the_matrix_units_for_them(model: str, cache: str) -> None:
    """On Hopper, without spills in the innermost loop, which converts nothing but sums of int8."""
    scores, _ = ahead.decode_launches(decode_shape(model, cache), GPUS["H200"])
    (loop, *_) = ahead.compiled(scores, GPUS["H200"]).loops
    assert loop.operations["QGMMA" if cache.endswith("fp8") else "IGMMA"] > 0
    assert loop.operations["HGMMA"] == loop.operations["F2FP"] == loop.spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", ",basis=joint"])
def test_kernels_compile_for_amd_without_spills(options: str) -> None:
    launches = ahead.decode_launches(decode_shape("Llama-3.1-8B", f"xquant:4{options}"), GPUS["MI300X"])
    assert len(launches) == 2
    for launch in launches:
        code = ahead.compiled_for_amd(launch, GPUS["MI300X"])
        assert re.findall(r"[vs]gpr_spill_count: *(\d+)", code) == ["0", "0"]
        assert "v_mfma" in code


@pytest.mark.slow
@pytest.mark.parametrize(("model", "options"), SUMS[1:3])
def test_kernels_of_sums_compile_for_amd_without_spills(model: str, options: str) -> None:
    for launch in ahead.sum_launches(sum_shape(model, f"xquant-cl:2{options}"), GPUS["MI300X"]):
        code = ahead.compiled_for_amd(launch, GPUS["MI300X"])
        assert re.findall(r"[vs]gpr_spill_count: *(\d+)", code) == ["0", "0"]
