"""Times Hugging Face transformers' `generate` on the CPU, to set beside our own figures.

    python benchmarks/transformers_decode.py MODEL --cache quantized --nbits 4 --prompt-tokens 1024

It runs on Linux in a Python with torch, transformers and, for quantized caches, the package of the backend
(`optimum-quanto` or `hqq`); the library itself needs none of them. Prefill and decode are told apart by a
streamer, which notes when `generate` hands over the prompt and then each new token. The first new token comes
out of prefill, the other `new_tokens - 1` are decode. Prompts are random tokens, every row of the batch its
own; no end token stops a run.

The result is one JSON object: medians over the repeats after one warm-up, the bytes that the cache holds at
the end, and resident memory: the peak of the whole process (with torch and the loading of the weights), what
stays once the model is loaded, and the peak while generating.
"""

# pyright: reportMissingImports=false

import argparse
import dataclasses
import importlib.metadata
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

# Quantized along the axis that each backend groups contiguously; both take groups of 64 and keep the
# newest 128 tokens as they are, which are the defaults of transformers.
BACKENDS = {
    "quanto": ("optimum-quanto", {"axis_key": 0, "axis_value": 0}),
    "hqq": ("hqq", {"axis_key": 1, "axis_value": 1}),
}


class Stopwatch(BaseStreamer):
    """Notes when the prompt goes in and when every new token comes out, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with one token per row and step."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by `generate` when it is done."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of `generate`: seconds of prefill and of all decode steps, bytes of the cache at the end."""

    prefill: float
    decode: float
    cache_bytes: int


def new_cache(model: PreTrainedModel, arguments: argparse.Namespace) -> Cache:
    """An empty cache of the kind asked for."""
    if arguments.cache == "dynamic":
        return DynamicCache(config=model.config)
    _, axes = BACKENDS[arguments.backend]
    return QuantizedCache(arguments.backend, model.config, nbits=arguments.nbits, **axes)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every plain tensor inside a value: of containers, of objects, and of tensor subclasses."""
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        yield from tensors([getattr(value, name) for name in names])
    elif isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all distinct storages that the layers of a cache hold."""
    held = tensors([vars(layer) for layer in cache.layers])
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(storages.values())


def generate(model: PreTrainedModel, prompt: torch.Tensor, arguments: argparse.Namespace) -> Run:
    """Generates exactly `new_tokens` tokens per row, greedily, and times it."""
    cache, stopwatch = new_cache(model, arguments), Stopwatch()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        streamer=stopwatch,
        do_sample=False,
        min_new_tokens=arguments.new_tokens,
        max_new_tokens=arguments.new_tokens,
    )
    assert output.shape[1] == prompt.shape[1] + arguments.new_tokens, output.shape
    start, first, *_, last = stopwatch.times
    return Run(first - start, last - first, cache_bytes(cache))


def load(arguments: argparse.Namespace) -> PreTrainedModel:
    """The model in the dtype asked for, its end token taken away."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def resident_bytes(field: str) -> int:
    """Resident memory of this process: `VmRSS` now, or `VmHWM`, its peak since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))  # given in KiB


def reset_peak() -> None:
    """Lets `VmHWM` start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Loads the model, runs it once to warm up, then `repeats` times."""
    torch.set_num_threads(arguments.threads)
    model = load(arguments)
    loading_peak, loaded = resident_bytes("VmHWM"), resident_bytes("VmRSS")
    reset_peak()
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, arguments.prompt_tokens)
    prompt = torch.randint(model.config.vocab_size, shape, generator=generator)

    generate(model, prompt, arguments)
    runs = [generate(model, prompt, arguments) for _ in range(arguments.repeats)]
    generating_peak = resident_bytes("VmHWM")
    decode_seconds = statistics.median(run.decode for run in runs)
    steps = arguments.new_tokens - 1
    return {
        "prefill_seconds": statistics.median(run.prefill for run in runs),
        "decode_seconds_per_step": decode_seconds / steps,
        "decode_tokens_per_second": arguments.batch * steps / decode_seconds,
        "cache_bytes": runs[-1].cache_bytes,
        "peak_rss_bytes": max(loading_peak, generating_peak),
        "loaded_rss_bytes": loaded,
        "generating_peak_rss_bytes": generating_peak,
    }


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was measured, and with which versions."""
    quantized = arguments.cache == "quantized"
    packages = ["torch", "transformers"] + [BACKENDS[arguments.backend][0]] * quantized
    return {
        "model": arguments.model.name,
        "cache": arguments.cache,
        "backend": arguments.backend if quantized else None,
        "nbits": arguments.nbits if quantized else None,
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("--cache", choices=["dynamic", "quantized"], default="dynamic")
    parser.add_argument("--backend", choices=list(BACKENDS), default="quanto", help="of the quantized cache")
    parser.add_argument("--nbits", type=int, default=4, help="quanto: 2 or 4; hqq: 1, 2, 3, 4 or 8")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=129, help="at least 2; the first belongs to prefill")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    if arguments.new_tokens < 2:
        parser.error(f"--new-tokens {arguments.new_tokens} leaves no decode step; give at least 2")
    return arguments


def main() -> None:
    arguments = parse()
    logging.disable_progress_bar()
    text = json.dumps(settings(arguments) | measure(arguments), indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
