"""Which rows are checked and timed, what matters most first: time may run out."""

from collections.abc import Iterator

from benchmarks.decode.rows import SHORT, Row, SumRow

KERNELS = "triton"
"""The implementation that is looked at."""

LLAMA_3, LLAMA_2, TINY, TINY_2 = "Llama-3.1-8B", "Llama-2-7B", "tiny", "tiny, K = H"
SMALL = (1, 128)  # batch and context that an interpreter can do

SIZES = [  # batch and context; the first is looked at thoroughly
    *((8, 65536), (1, 131072), (32, 16384), (8, 16384), (32, 4096), (1, 16384), (8, 131072), (32, 65536)),
    *((8, 4096), (1, 65536), (1, 4096), (32, 131072)),
]
CACHES = ["xquant:4", "int8", "xquant:4,basis=joint", "xquant:2", "xquant:3"]
DENSE = ["xquant:4", "xquant:2", "xquant:3", "xquant:4,rebuild_dtype=fp8", "xquant:4,rebuild_dtype=int8"]  # K = H
VARIANTS = [("xquant:4", "fused=1"), ("xquant:4", "warps=8"), ("kivi:4", "fused=0"), ("int8", "warps=8")]

SUMS = [
    (LLAMA_3, "xquant-cl:2"),
    (LLAMA_3, "xquant-cl:2,rank=512"),
    (LLAMA_3, "xquant-cl:2,predict=paper"),
    (LLAMA_2, "xquant-cl:2"),
]


def first_layers(smoke: bool) -> Iterator[Row]:
    """What is timed of attention to one layer before anything else: all there is of one size."""
    if smoke:
        yield Row(TINY, "bf16", *SMALL, "xla")
        for cache in ("xquant:4", "xquant:2,basis=joint"):
            yield Row(TINY, cache, *SMALL, KERNELS)
        return
    size = SIZES[0]
    yield Row(LLAMA_3, "bf16", *size, "cudnn")
    yield Row(LLAMA_3, "xquant:4", *size, KERNELS)
    yield Row(LLAMA_3, "bf16", *size, "torch")
    for cache in (*CACHES[1:], "kivi:4"):
        yield Row(LLAMA_3, cache, *size, KERNELS)
    for cache, variant in VARIANTS:
        yield Row(LLAMA_3, cache, *size, KERNELS, variant=variant)
    for cache in ("xquant:4,basis=joint", "xquant:4", "fp8"):  # dequantized, and multiplied by cuBLAS
        yield Row(LLAMA_3, cache, *size, "xla")
    for implementation in ("pallas", "xla", "tokamax"):
        yield Row(LLAMA_3, "bf16", *size, implementation)


def more_layers(smoke: bool) -> Iterator[Row]:
    """What is timed of it at the end: dense rebuilds, and the other sizes."""
    if smoke:
        return
    yield Row(LLAMA_2, "bf16", *SIZES[0], "cudnn")
    yield Row(LLAMA_2, "xquant:4", *SIZES[0], KERNELS)
    yield Row(LLAMA_2, "xquant:4", *SIZES[0], "xla")
    for cache in DENSE[1:]:
        yield Row(LLAMA_2, cache, *SIZES[0], KERNELS)
    for size in SIZES[1:]:
        yield Row(LLAMA_3, "bf16", *size, "cudnn")
        for cache in CACHES:
            yield Row(LLAMA_3, cache, *size, KERNELS)
        if size[0] * size[1] <= 2**19:  # 8.6 GB of bf16 keys and values in a layer
            yield Row(LLAMA_2, "bf16", *size, "cudnn")
            yield Row(LLAMA_2, "xquant:4", *size, KERNELS)


def sums(smoke: bool) -> Iterator[SumRow]:
    """What is timed of running sums."""
    for model, cache in [(TINY, "xquant-cl:2")] if smoke else SUMS:
        for implementation in (KERNELS,) if smoke else (KERNELS, "xla"):
            yield SumRow(model, cache, *(SMALL if smoke else SIZES[0]), implementation)


def more_checks(smoke: bool) -> Iterator[Row]:
    """What is held against the reference beside the rows that are timed: ragged batches, and all numbers of bits."""
    if smoke:
        return
    forms = ["xquant:{}", "xquant:{},basis=joint", "kivi:{}"]
    for form in forms:
        yield Row(LLAMA_3, form.format(4), 4, 65536, KERNELS, ragged=True)
    for bits in (2, 3, 4, 8):
        for form in forms:
            yield Row(LLAMA_3, form.format(bits), 2, SHORT, KERNELS)
    for cache in ("xquant:8", "xquant:8,rebuild_dtype=int8"):
        yield Row(LLAMA_2, cache, 2, SHORT, KERNELS)
