"""Accuracy of cache methods on a text, at what size and speed: what `xquant eval` measures.

Tokens 2 ... N of each window of the text are predicted (protocols: `evaluation.scoring`). Perplexity is exp of the mean
negative log-likelihood. Differences refer to the baseline, the model without a cache, window by window.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import CacheBytes, allocate, cache_bytes
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.evaluation.results import Evaluation, Measurement
from xquant_jax.evaluation.scoring import CHUNK, PROTOCOLS, Scorer, Scores
from xquant_jax.evaluation.windows import Windows, cut
from xquant_jax.model.loading import Model
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import allocate_blocks

BATCH = 8
"""Windows at once where none is asked for."""


def paper_ratio(cache: CacheConfig, config: ModelConfig, tokens: int | None = None) -> float:
    """Size of a token in the history, codes and scales of all layers, relative to keys and values of 16 bits.

    tokens: of a sequence, which share what its first ones take that are kept as they are; endless without
    """
    size = 0
    for method, layers in cache.segments(config):
        if tokens:
            kept = sum(width * jnp.dtype(dtype).itemsize for width, dtype in method.window(config).values())
            size += BLOCK * layers * method.sink * kept / tokens
        blocks = [
            jax.eval_shape(lambda spec=spec: allocate_blocks(spec, ())) for spec in method.streams(config).values()
        ]
        size += layers * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(blocks))
    return size / BLOCK / (config.num_layers * 4 * config.kv_width)


def allocated(cache: CacheConfig, config: ModelConfig, tokens: int) -> CacheBytes:
    """What a cache for one sequence of `tokens` tokens takes, window and scratch included."""
    return cache_bytes(jax.eval_shape(lambda: allocate(cache, config, batch=1, tokens=tokens)))


def prepare(
    model: Model,
    windows: Windows,
    caches: Sequence[str],
    *,
    protocol: str = "paper",
    chunk: int = CHUNK,
    name: str = "",
    text: str = "",
) -> Evaluation:
    """An evaluation with nothing measured yet; `name` and `text` say in the report what was measured on what.

    Raises `ConfigError` for a cache that is not known or does not fit the model, before anything is computed.
    """
    seq_len = windows.tokens.shape[1]
    model.config.rope.check(seq_len)
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol={protocol} is not known; choose {' or '.join(PROTOCOLS)}")
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} is not possible; choose 1 or more")
    if not caches:
        raise ConfigError("there is no cache to measure; name at least one")

    def measurement(spec: str) -> Measurement:
        cache = CacheConfig.parse(spec)
        return Measurement(
            spec,
            paper_ratio(cache, model.config, seq_len),
            allocated(cache, model.config, seq_len),
            calibration=model.calibration_hash(cache),
        )

    return Evaluation(
        model=name,
        weights=model.fingerprint,
        text=text,
        seq_len=seq_len,
        protocol=protocol,
        chunk=chunk,
        dtype=model.dtype,
        text_sha256=windows.text_sha256,
        predicted_bytes=windows.predicted_bytes.tolist(),
        baseline=Measurement("none", 1.0, CacheBytes(0, 0, 0, 0)),
        measurements=[measurement(spec) for spec in dict.fromkeys(caches)],
    )


def run(evaluation: Evaluation, model: Model, windows: Windows, *, batch: int | None = None) -> Iterator[Measurement]:
    """Measures what is missing, the baseline first.

    Yields a measurement when it begins, before anything is compiled, and whenever a batch of its windows is done.
    batch: windows at once, by default `BATCH`
    """
    count, seq_len = windows.tokens.shape
    batch = min(batch or BATCH, count)
    lengths = np.full(batch, seq_len, np.int32)
    hidden: list[np.ndarray] = []  # of the baseline's windows, which the others are compared with

    waiting = [m for m in evaluation.measurements if len(m.losses) < count]
    if waiting or len(evaluation.baseline.losses) < count:
        waiting = [evaluation.baseline, *waiting]
    for m in waiting:
        yield m
        exact = m is evaluation.baseline
        cache = None if exact else CacheConfig.parse(m.cache)
        scorer = Scorer(model, cache, evaluation.protocol, evaluation.chunk)
        program = scorer.program(batch, seq_len, compares=not exact)
        for start in range(0 if exact else len(m.losses), count, batch):
            rows = slice(start, min(start + batch, count))
            references = [] if exact else [fill(np.stack(hidden[rows]), batch)]
            begun = time.perf_counter()
            scores = jax.block_until_ready(program(fill(windows.tokens[rows], batch), lengths, *references))
            seconds = time.perf_counter() - begun
            if exact:
                hidden += list(np.asarray(scores.hidden[: rows.stop - start]))
            known = len(m.losses) - start  # of an earlier run; hidden states were not kept
            _add(m, scores, slice(max(0, known), rows.stop - start), seconds / batch)
            yield m


def fill(rows: np.ndarray, batch: int) -> np.ndarray:
    """A batch that is not full with its last row repeated, so that nothing compiles anew."""
    return np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])


def _add(m: Measurement, scores: Scores, rows: slice, seconds: float) -> None:
    """Takes over the windows of these rows of a batch, each of which took so long."""

    def means(a: Any) -> list[float]:
        return np.asarray(a[rows], np.float64).mean(axis=1).tolist()

    losses = means(scores.loss)
    m.losses += losses
    m.divergences += [0.0] * len(losses) if scores.divergence is None else means(scores.divergence)
    m.agreements += [1.0] * len(losses) if scores.agrees is None else means(scores.agrees)
    m.seconds += seconds * len(losses)


def evaluate(
    model: Model,
    text: str,
    caches: Sequence[str],
    *,
    seq_len: int = 512,
    limit_windows: int | None = None,
    protocol: str = "paper",
    batch: int | None = None,
) -> Evaluation:
    """Measures every cache on a text, see the module's docstring. Raises `ConfigError` for what cannot be honoured."""
    windows = cut(model, text, seq_len, limit_windows)
    evaluation = prepare(model, windows, caches, protocol=protocol)
    for _ in run(evaluation, model, windows, batch=batch):
        pass
    return evaluation
