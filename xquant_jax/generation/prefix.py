"""Beginnings of prompts that are fed once: those that users keep (`prefill`, `Prefix`), and how much of one is used."""

import dataclasses
import math
from pathlib import Path
from typing import Any, SupportsIndex

import jax
import numpy as np

from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.shared import whole_blocks_alone
from xquant_jax.cache.state import Cache, allocate
from xquant_jax.errors import ConfigError, PromptError
from xquant_jax.generation import prefix_file
from xquant_jax.generation.buckets import bucket_length
from xquant_jax.generation.prefill import store
from xquant_jax.generation.prompts import Prompt, prompt_tokens
from xquant_jax.generation.request import CheckedRequest, Options
from xquant_jax.generation.slots import Arrivals
from xquant_jax.model.loading import Model
from xquant_jax.numerics.packing import BLOCK


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """What prompts begin with, fed and stored; see `prefill`.

    tokens: its token ids
    cache: its whole blocks in one row, as far as they are what any prompt that goes on would have made of them; the
        rest is fed again
    made_with: what its blocks depend on besides the tokens
    """

    tokens: list[int]
    cache: Cache
    made_with: dict[str, Any]

    @property
    def stored(self) -> int:
        """How many of its tokens are stored."""
        return BLOCK * int(self.cache.history_blocks[0])

    def save(self, directory: str | Path) -> None:
        """Writes it to a new directory, whole or not at all; `load_prefix` reads it.

        Raises `CheckpointError` for a directory that is not empty, or cannot be written.
        """
        prefix_file.write(Path(directory), {"tokens": self.tokens, "made_with": self.made_with}, self.cache)


def prefill(
    model: Model,
    prompt: Prompt,
    *,
    cache: str | CacheConfig = "xquant:4",
    prefill_chunk: SupportsIndex | None = 512,
    add_special_tokens: bool = True,
) -> Prefix:
    """Feeds what prompts will begin with, a text or token ids, once; `generate(..., prefix=...)` goes on from there.

    The answers are those to the whole prompts. A text and what follows it must be the tokens of both together: it is
    best cut where a token surely ends, behind a newline or a special token, or given as token ids.

    cache, prefill_chunk: those of the calls that will use it
    add_special_tokens: as in `generate`

    Raises `PromptError` for a prompt that the model cannot take, or for which its logits are not finite, `ConfigError`
    for an option that cannot be honoured.
    """
    options = Options(cache, prefill_chunk).checked()
    check_sharing(model, options)
    _, tokens = prompt_tokens(model, "the prefix", prompt, add_special_tokens)
    whole = len(tokens) // quantum(options) * quantum(options)
    made = made_with(model, options)
    length, chunk = bucket_length(max(whole, 1), options.prefill_chunk)
    arrivals = Arrivals.of([[CheckedRequest("", tokens[:whole])] if whole else [None]], length, stops=1)
    finite, stored = store(
        model.transformer,
        model.params,
        model.method_params(options.cache_config),
        arrivals,
        cache_config=options.cache_config,
        chunk=chunk,
        tokens=max(whole, BLOCK),
        implementation=model.implementation,
    )
    if whole and not np.asarray(finite).all():
        raise PromptError("the logits behind the prefix are not finite: numbers overflow, or weights are damaged")
    return Prefix(tokens, stored, made)


def load_prefix(model: Model, directory: str | Path) -> Prefix:
    """What `Prefix.save` wrote, for the model that it was made with.

    Raises `CheckpointError` for files that are missing or not as they were written, `ConfigError` for a prefix that
    this model would not have made.
    """
    directory = Path(directory)
    said = prefix_file.read(directory)
    tokens, made = said["tokens"], said["made_with"]
    options = Options(made["cache"], made["prefill_chunk"])
    check_made(made, model, options)

    def empty() -> Cache:
        whole = len(tokens) // quantum(options) * quantum(options)
        cache = allocate(
            options.cache_config,
            model.config,
            batch=1,
            tokens=max(whole, BLOCK),
            implementation=model.implementation,
        )
        return dataclasses.replace(whole_blocks_alone(cache), running_sum=None)

    return Prefix(tokens, prefix_file.read_arrays(directory, jax.eval_shape(empty)), made)


def quantum(options: Options) -> int:
    """Tokens in multiples of which a beginning can be stored for any prompt that goes on from it: whole blocks, and
    whole chunks, since tokens of a chunk see each other exactly."""
    return math.lcm(BLOCK, options.prefill_chunk or BLOCK)


def check_sharing(model: Model, options: Options) -> None:
    """Raises `ConfigError` where beginnings cannot be stored apart."""
    if options.prefill_chunk is None:
        raise ConfigError("a prefix needs prefill_chunk: without it the whole prompt is fed at once, prefix and all")
    check_alone(model, options)


def check_alone(model: Model, options: Options) -> None:
    """Raises `ConfigError` for a mesh: what is shared lies on one device."""
    if model.mesh is not None or options.mesh is not None:
        raise ConfigError("what requests share cannot be spread over a mesh yet; leave out the prefix or the mesh")


def made_with(model: Model, options: Options) -> dict[str, Any]:
    """What stored blocks depend on besides the tokens, ready for JSON."""
    config = options.cache_config
    return {
        "weights": model.checksum,
        "dtype": model.dtype,
        "rope": str(model.config.rope),
        "sliding_windows": str(model.config.sliding_windows),
        "norm_eps": model.config.norm_eps,
        "cache": str(config),
        "calibration": model.calibration_hash(config),
        "prefill_chunk": options.prefill_chunk,
    }


def check_prefix(prefix: Prefix, model: Model, options: Options) -> None:
    """Raises `ConfigError` for a prefix that this model and these options would not have made, and for what is none."""
    if not isinstance(prefix, Prefix):
        raise ConfigError(f"prefix={prefix!r} is not a prefix; give what prefill or load_prefix returns")
    check_made(prefix.made_with, model, options)


def check_made(made: dict[str, Any], model: Model, options: Options) -> None:
    """The same, by what it was made with."""
    check_sharing(model, options)
    for name, value in made_with(model, options).items():
        if (own := made.get(name)) != value:
            raise ConfigError(f"the prefix was made with {name}={own}, and here it is {value}; make it anew")


def check_begins(prefix: Prefix, request: CheckedRequest, name: str = "the prompt") -> None:
    """Raises `PromptError` for a prompt that does not begin with the prefix."""
    tokens = prefix.tokens
    if request.tokens[: len(tokens)] != tokens:
        same = next(
            (i for i, (a, b) in enumerate(zip(tokens, request.tokens, strict=False)) if a != b), len(request.tokens)
        )
        raise PromptError(
            f"{name} does not begin with the prefix: its token {same} differs; give the whole text, the prefix and "
            f"what follows it, and cut the prefix where a token ends"
        )


def used(prefix: Prefix | None, options: Options, shortest: int) -> int:
    """Stored tokens that all prompts go on from, `shortest` being that of the shortest: at least one must be fed."""
    return 0 if prefix is None else min(prefix.stored, (shortest - 1) // quantum(options) * quantum(options))


def usable(prefix: Prefix, options: Options, shortest: int) -> Cache:
    """The stored row, as far as it is `used`."""
    counts = np.full(1, used(prefix, options, shortest), np.int32)
    return dataclasses.replace(prefix.cache, lengths=counts, history_blocks=counts // BLOCK)
