"""Options of a run, once for every command that generates: as arguments, and as the objects they stand for."""

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from xquant_jax.errors import ConfigError, PromptError
from xquant_jax.generation.batch import DEFAULT_SLOTS
from xquant_jax.generation.prefix import Prefix, check_prefix, load_prefix, prefill
from xquant_jax.generation.request import Options, Request, check_wishes, fresh_seed
from xquant_jax.generation.sampling import Sampling, recommended
from xquant_jax.model.loading import DTYPES, Model, load

MODEL = 'converted or Hugging Face directory, a name on the Hub (org/model), or "demo"'

LONGEST_SEQUENCE = "the longest sequence, for models whose RoPE depends on it"

PREFIX = "what all prompts begin with, fed once: a directory of `xquant prefill`, or a text file"


def add_options(
    parser: argparse.ArgumentParser,
    *,
    sampling: str = "greedy",
    max_new_tokens: int = 128,
    texts: bool = True,
    context: str = LONGEST_SEQUENCE,
) -> None:
    """What a prompt may ask for, how the model is loaded and how its cache is stored; `options_of` reads them.

    The arguments are what differs between commands: defaults, whether prompts may be texts, whose context it is.
    """
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="tokens of an answer at most")
    parser.add_argument(
        "--sampling",
        choices=("greedy", "model"),
        default=sampling,
        help="where the options below say nothing; model: as its generation_config.json says",
    )
    parser.add_argument("--temperature", type=float, help="0: greedy")
    parser.add_argument("--top-k", type=int, help="0: all tokens")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--frequency-penalty", type=float)
    parser.add_argument("--presence-penalty", type=float)
    parser.add_argument("--seed", type=int, help="of what is sampled (default: one is drawn, and told)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="a string that ends an answer; may be repeated, and may hold special tokens. A newline is $'\\n' in bash",
    )
    parser.add_argument("--stop-id", action="append", type=int, help="a token id that does, instead of the model's own")
    parser.add_argument("--ignore-eos", action="store_true", help="go on behind the model's own end of an answer")
    parser.add_argument("--min-tokens", type=int, default=0, help="of an answer before anything may end it")
    parser.add_argument(
        "--speculate",
        metavar="SPEC",
        help="drafts that are checked in one step, the text stays the same: lookup:4 (of what was said before), "
        "window:4 (by the model on its newest tokens)",
    )
    add_storing_options(parser, texts=texts, context=context)


def add_storing_options(
    parser: argparse.ArgumentParser, *, texts: bool = True, context: str = LONGEST_SEQUENCE
) -> None:
    """How texts become tokens, how the model is loaded and how its cache is stored and fed."""
    parser.add_argument("--cache", default="xquant:4", help="name[:bits][,option=value...]: bf16, int8, xquant:4 ...")
    if texts:
        parser.add_argument(
            "--add-special-tokens",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="such as a BOS before a text, as the tokenizer prescribes, unless the text begins with it",
        )
    parser.add_argument("--prefill-chunk", type=int, default=512, help="prompt tokens at once; 0: the whole prompt")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the model's; float32 on CPU)")
    parser.add_argument("--context", type=int, help=f"tokens of {context}")
    parser.add_argument(
        "--scan-layers",
        action=argparse.BooleanOptionalAction,
        help="compile a loop over the layers, or (the default on GPUs) one after another: slower to compile, and there "
        "faster to run",
    )
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
    parser.add_argument("--keep", action="store_true", help="carry columns that mean nothing here to the results")
    add_options(parser)


def load_model(arguments: argparse.Namespace, mesh: Mesh | None = None) -> Model:
    """The model that the options name."""
    given = {name: getattr(arguments, name) for name in ("dtype", "calibration", "context", "scan_layers")}
    if given["context"] is not None and given["context"] < 1:
        raise ConfigError(f"--context {given['context']} is not possible; choose 1 or more")
    return load(arguments.model, **given, mesh=mesh)


def options_of(arguments: argparse.Namespace) -> tuple[Request, Options]:
    """What every prompt asks for unless it says otherwise (a request without a prompt), and the options of the run.

    `settled` completes the request by what only the model knows.
    """
    given = vars(arguments)
    if arguments.ignore_eos and arguments.stop_id:
        raise ConfigError(
            "--ignore-eos and --stop-id are both given; stop ids stand instead of the model's own already"
        )
    request = Request(
        prompt="",
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        sampling=Sampling(**{field.name: given[field.name] for field in dataclasses.fields(Sampling)}),
        stop=arguments.stop,
        stop_ids=[] if arguments.ignore_eos else arguments.stop_id,
        min_tokens=arguments.min_tokens,
        n=given.get("n", 1),
        add_special_tokens=given.get("add_special_tokens", True),
    )
    options = Options(
        cache=arguments.cache,
        prefill_chunk=arguments.prefill_chunk or None,
        cache_tokens=given.get("cache_tokens"),
        slots=given.get("slots"),
        memory=parse_bytes(given.get("memory")),
        speculate=arguments.speculate,
    )
    return request, options


def read_text(path: str) -> str:
    """The text of a file as it is, `-` being stdin; a byte order mark before it is dropped."""
    name = "stdin" if path == "-" else path
    try:
        text = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not text:
        raise PromptError(f"{name} is empty; give at least one character")
    return text


def prefix_of(arguments: argparse.Namespace, model: Model, options: Options) -> Prefix | None:
    """The prefix of `--prefix`, if it is given: loaded from its directory, or made of a text.

    Raises `ConfigError` for one that was made with another model or other options.
    """
    path = arguments.prefix
    if path is None:
        return None
    if path.is_dir():
        prefix = load_prefix(model, path)
        check_prefix(prefix, model, options)
        return prefix
    return prefill(
        model,
        read_text(str(path)),
        cache=options.cache,
        prefill_chunk=options.prefill_chunk,
        add_special_tokens=arguments.add_special_tokens,
    )


def settled(request: Request, arguments: argparse.Namespace, model: Model, seed: int | None = None) -> Request:
    """The request of `options_of` with the model's sampling where it is asked for, and a seed: its own, else this one,
    else a fresh one.

    Raises `ConfigError` for what the model cannot honour.
    """
    base = recommended(model.generation_config) if arguments.sampling == "model" else Sampling()
    own: Any = request.sampling
    if request.seed is None:
        request = dataclasses.replace(request, seed=fresh_seed() if seed is None else seed)
    request = dataclasses.replace(request, sampling=own.over(base))
    check_wishes(model, request)
    return request


def told(request: Request) -> str:
    """How tokens are chosen, in words; with the seed where it matters."""
    sampling: Any = request.sampling
    return sampling.told() + (f", seed {request.seed}" if sampling.temperature else "")


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
