"""Options of a run, once for every command."""

import argparse
import re
from pathlib import Path
from typing import Any

from xquant_jax.errors import ConfigError
from xquant_jax.generation import batch
from xquant_jax.generation.sampling import Sampling
from xquant_jax.model.loading import DTYPES


def add_options(parser: argparse.ArgumentParser) -> None:
    """Everything but the files; `options_of` turns it into arguments."""
    parser.add_argument("--cache", default="xquant:4", help="name[:bits][,option=value...]: bf16, int8, xquant:4 ...")
    parser.add_argument("--slots", type=int, help=f"sequences at the same time (default: {batch.DEFAULT_SLOTS})")
    parser.add_argument("--memory", help="instead of --slots, bytes that the caches may take: 500000000, 12GB or 8GiB")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int, default=0, help="of every prompt that does not name its own")
    parser.add_argument("--stop", action="append", default=[], help="a string that ends an answer; may be repeated")
    parser.add_argument("--stop-id", action="append", type=int, help="a token id that does, instead of the model's own")
    parser.add_argument("--prefill-chunk", type=int, default=512, help="prompt tokens at once; 0: the whole prompt")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the model's; float32 on CPU)")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="of xquant calibrate (default: the model's own)"
    )


def options_of(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that `batch.prepare` and `settings_of` share, and those that only say how much runs at once."""
    options = {
        "cache": arguments.cache,
        "max_new_tokens": arguments.max_new_tokens,
        "sampling": Sampling(
            repetition_penalty=arguments.repetition_penalty,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
        ),
        "seed": arguments.seed,
        "stop": arguments.stop,
        "stop_ids": arguments.stop_id,
        "prefill_chunk": arguments.prefill_chunk or None,
    }
    return options, {"slots": arguments.slots, "memory": parse_bytes(arguments.memory)}


def parse_bytes(text: str | None) -> int | None:
    """Bytes from 500000000, 12GB (powers of 1000) or 8GiB (powers of 1024)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT])(i?)B)?", text, flags=re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--memory {text} is not a number of bytes; write 500000000, 12GB or 8GiB")
    number, prefix, binary = match.groups()
    power = 0 if prefix is None else "KMGT".index(prefix.upper()) + 1
    return int(float(number) * (1024 if binary else 1000) ** power)
