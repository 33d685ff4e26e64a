"""Which rows are checked and timed, what matters most first: time may run out."""

import itertools
from collections.abc import Iterator

from benchmarks.decode.rows import SHORT, Row, SumRow

KERNELS = "triton"
"""The implementation that is looked at."""

LLAMA_3, LLAMA_2, TINY, TINY_2 = "Llama-3.1-8B", "Llama-2-7B", "tiny", "tiny, K = H"
SMALL = (2, 256)  # batch and context that an interpreter can do

SIZES = [  # batch and context; the first is looked at thoroughly
    *((8, 65536), (1, 131072), (32, 16384), (8, 16384), (32, 4096), (1, 16384), (8, 131072), (32, 65536)),
    *((8, 4096), (1, 65536), (1, 4096), (32, 131072)),
]
CACHES = ["xquant:4", "int8", "xquant:4,basis=joint", "xquant:2", "xquant:3"]

SUMS = [
    (LLAMA_3, "xquant-cl:2"),
    (LLAMA_3, "xquant-cl:2,rank=512"),
    (LLAMA_3, "xquant-cl:2,predict=paper"),
    (LLAMA_2, "xquant-cl:2"),
]


def attention(smoke: bool) -> Iterator[Row]:
    """What is timed of attention to one layer."""
    if smoke:
        yield Row(TINY, "bf16", *SMALL, "xla")
        yield Row(TINY, "xquant:4", *SMALL, "xla")
        for cache in ("xquant:4", "xquant:2,basis=joint", "int8"):
            yield Row(TINY, cache, *SMALL, KERNELS)
        yield Row(TINY_2, "xquant:4,rebuild_dtype=fp8", *SMALL, KERNELS)
        return
    for size in SIZES:
        thorough = size == SIZES[0]
        for implementation in ("cudnn", "xla", "tokamax", "pallas") if thorough else ("cudnn",):
            yield Row(LLAMA_3, "bf16", *size, implementation)
        for cache in [*CACHES, "kivi:4"] if thorough else CACHES:
            yield Row(LLAMA_3, cache, *size, KERNELS)
        if thorough:
            yield Row(LLAMA_3, "xquant:4", *size, "xla")
            yield Row(LLAMA_3, "fp8", *size, "xla")
        if size[0] * size[1] <= 2**19:  # 8.6 GB of bf16 keys and values in a layer
            yield Row(LLAMA_2, "bf16", *size, "cudnn")
            more = ["xquant:2", "xquant:3", "xquant:4,rebuild_dtype=fp8", "xquant:4,rebuild_dtype=int8"]
            for cache in ["xquant:4", *more] if thorough else ["xquant:4"]:
                yield Row(LLAMA_2, cache, *size, KERNELS)


def sums(smoke: bool) -> Iterator[SumRow]:
    """What is timed of running sums."""
    for (model, cache), implementation in itertools.product(
        [(TINY, "xquant-cl:2")] if smoke else SUMS, (KERNELS, "xla")
    ):
        yield SumRow(model, cache, *(SMALL if smoke else SIZES[0]), implementation)


def checks(smoke: bool) -> Iterator[Row | SumRow]:
    """What is held against the reference before anything is timed."""
    size, ragged = (SMALL, (4, 640)) if smoke else ((2, SHORT), (4, 65536))
    grouped, multi_head = (TINY, TINY_2) if smoke else (LLAMA_3, LLAMA_2)
    forms = ["xquant:{}", "xquant:{},basis=joint", "kivi:{}"]
    small = ["xquant:4,rebuild_dtype=fp8", "xquant:4,rebuild_dtype=int8", "xquant:8,rebuild_dtype=int8"]
    for bits in (4,) if smoke else (2, 3, 4, 8):
        for form in forms:
            yield Row(grouped, form.format(bits), *size, KERNELS)
    for form in forms[:1] if smoke else forms:
        yield Row(grouped, form.format(4), *ragged, KERNELS, ragged=True)
    plain = [] if smoke else [f"xquant:{bits}" for bits in (2, 3, 4, 8)]
    for cache in [*plain, *(small[:1] if smoke else small)]:
        yield Row(multi_head, cache, *size, KERNELS)
    if not smoke:
        yield Row(grouped, "int8", *size, KERNELS)
    for row in sums(smoke):
        if row.implementation == KERNELS:
            yield row.shortened()
