"""Options of a run, once for every command that generates: as arguments, and as the objects they stand for."""

import argparse
import re
from pathlib import Path

from xquant_jax.errors import ConfigError
from xquant_jax.generation.batch import DEFAULT_SLOTS
from xquant_jax.generation.request import Options, Request
from xquant_jax.generation.sampling import Sampling
from xquant_jax.model.loading import DTYPES

MODEL = 'converted or Hugging Face directory, or "demo"'


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a prompt may ask for, how the model is loaded and how its cache is stored; `options_of` reads them."""
    parser.add_argument("--cache", default="xquant:4", help="name[:bits][,option=value...]: bf16, int8, xquant:4 ...")
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


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the files and the options of a command that answers the prompts of a file."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("prompts", metavar="PROMPTS.jsonl", type=Path)
    parser.add_argument("results", metavar="RESULTS.jsonl", type=Path)
    parser.add_argument("--slots", type=int, help=f"sequences at the same time (default: {DEFAULT_SLOTS})")
    parser.add_argument("--memory", help="instead of --slots, bytes that the caches may take: 500000000, 12GB or 8GiB")
    add_options(parser)


def options_of(arguments: argparse.Namespace) -> tuple[Request, Options]:
    """What every prompt asks for unless it says otherwise (a request without a prompt), and the options of the run."""
    given = vars(arguments)
    request = Request(
        prompt="",
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        sampling=Sampling(
            repetition_penalty=arguments.repetition_penalty,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
        ),
        stop=arguments.stop,
        stop_ids=arguments.stop_id,
    )
    options = Options(
        cache=arguments.cache,
        prefill_chunk=arguments.prefill_chunk or None,
        cache_tokens=given.get("cache_tokens"),
        slots=given.get("slots"),
        memory=parse_bytes(given.get("memory")),
    )
    return request, options


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
