"""Accuracy of cache methods on a text, at what size and speed: what `xquant eval` measures.

Tokens 2 ... N of each window of the text are predicted (protocols: `evaluation.scoring`). Perplexity is exp of the mean
negative log-likelihood. Differences refer to the baseline, the model without a cache, window by window.
"""

import dataclasses
import math
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
from xquant_jax.evaluation.scoring import CHUNK, PROTOCOLS, Scorer
from xquant_jax.evaluation.windows import Windows, cut
from xquant_jax.model.loading import Model
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import allocate_blocks

IDENTITY = ("model", "weights", "text", "seq_len", "protocol", "chunk", "dtype", "text_sha256")
"""Fields of `Evaluation` that say what is measured, and that a JSON begins with."""

LOGITS_AT_ONCE = 2**28
"""Logits of a batch of windows (4 bytes each); bounds the batch where none is asked for."""


@dataclasses.dataclass
class Measurement:
    """One method's results so far.

    cache: the spec as it was typed
    paper_ratio: size of a cached token, relative to keys and values of 16 bits; its share of the first tokens that are
        kept as they are included
    allocated: what a cache for one window takes
    losses: mean nats per predicted token, of each window in turn
    seconds: what that took, compilation aside
    calibration: hash of the file whose levels or directions the method takes, if it takes any
    """

    cache: str
    paper_ratio: float
    allocated: CacheBytes
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    calibration: str | None = None


@dataclasses.dataclass
class Evaluation:
    """A run: what is measured on what, and the measurements so far.

    weights: the model's fingerprint
    chunk: tokens fed at once in protocol "streaming"
    predicted_bytes: of each window, how many bytes of text its tokens 2 ... N stand for
    baseline: the model without a cache
    """

    model: str
    weights: str
    text: str
    seq_len: int
    protocol: str
    chunk: int
    dtype: str
    text_sha256: str
    predicted_bytes: list[int]
    baseline: Measurement
    measurements: list[Measurement]

    def row(self, m: Measurement) -> dict[str, Any]:
        """One method's figures over the windows it has seen; None where there is no number."""
        count, tokens = len(m.losses), self.seq_len - 1
        losses, exact = (np.asarray(losses[:count], np.float64) for losses in (m.losses, self.baseline.losses))
        nll = losses.mean() if count else math.nan
        difference = losses - exact if len(exact) == count else np.full(count, math.nan)
        total_bytes = sum(self.predicted_bytes[:count])
        numbers = {
            "perplexity": float(np.exp(nll)),
            "nll": float(nll),
            "delta_nll": float(difference.mean()) if count else math.nan,
            "stderr": float(difference.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan,
            "bits_per_byte": float(nll * tokens * count / math.log(2) / total_bytes) if total_bytes else math.nan,
            "paper_ratio": m.paper_ratio,
            "allocated_bytes": m.allocated.total,
            "tokens_per_second": count * self.seq_len / m.seconds if m.seconds else math.nan,
        }
        return {"cache": m.cache} | {name: n if math.isfinite(n) else None for name, n in numbers.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything, losses of each window included, so that `from_json` can continue."""

        def full(m: Measurement) -> dict[str, Any]:
            losses = [loss if math.isfinite(loss) else None for loss in m.losses]
            return self.row(m) | {
                "allocated": dataclasses.asdict(m.allocated),
                "seconds": m.seconds,
                "calibration": m.calibration,
                "window_nlls": losses,
            }

        return self.identity() | {
            "predicted_bytes": self.predicted_bytes,
            "baseline": full(self.baseline),
            "rows": [full(m) for m in self.measurements],
        }

    @classmethod
    def from_json(cls, document: Any) -> "Evaluation":
        """What `to_json` wrote. Raises `ConfigError` for anything else."""

        def measurement(row: Any) -> Measurement:
            losses = [math.nan if loss is None else float(loss) for loss in row["window_nlls"]]
            allocated = CacheBytes(**row["allocated"])
            return Measurement(
                row["cache"], float(row["paper_ratio"]), allocated, losses, float(row["seconds"]), row["calibration"]
            )

        try:
            return cls(
                **{name: document[name] for name in IDENTITY},
                predicted_bytes=document["predicted_bytes"],
                baseline=measurement(document["baseline"]),
                measurements=[measurement(row) for row in document["rows"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"this JSON was not written by xquant eval ({error!r}); choose another file") from error

    def identity(self) -> dict[str, Any]:
        """What must be the same for measurements to be comparable."""
        return {name: getattr(self, name) for name in IDENTITY} | {"windows": len(self.predicted_bytes)}

    def adopt(self, earlier: "Evaluation") -> None:
        """Takes over what an earlier run measured. Raises `ConfigError` if that run was about something else."""
        for name, value in self.identity().items():
            other = earlier.identity()[name]
            if other != value:
                raise ConfigError(
                    f"the earlier run has {name}={other}, this one {name}={value}: they cannot be one table; "
                    f"leave --resume out or choose another file"
                )
        mine = {m.cache: m.calibration for m in self.measurements}
        for m in earlier.measurements:
            if mine.get(m.cache, m.calibration) != m.calibration:
                raise ConfigError(
                    f"the earlier run measured {m.cache} with another calibration: they cannot be one table; leave "
                    f"--resume out or choose another file"
                )
        self.baseline = earlier.baseline
        found = {m.cache: m for m in earlier.measurements}
        self.measurements = [found.pop(m.cache, m) for m in self.measurements] + list(found.values())


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
    batch: windows at once, by default as many as `LOGITS_AT_ONCE` allows, up to 8
    """
    count, seq_len = windows.tokens.shape
    batch = batch or max(1, min(8, LOGITS_AT_ONCE // (seq_len * model.config.vocab_size)))
    batch = min(batch, count)
    lengths = np.full(batch, seq_len, np.int32)
    for m in [evaluation.baseline, *evaluation.measurements]:
        if len(m.losses) == count:
            continue
        yield m
        cache = None if m is evaluation.baseline else CacheConfig.parse(m.cache)
        program = Scorer(model, cache, evaluation.protocol, evaluation.chunk).program(batch, seq_len)
        while len(m.losses) < count:
            rows = windows.tokens[len(m.losses) : len(m.losses) + batch]
            full = np.resize(rows, (batch, seq_len))  # the last batch is filled up, so that nothing compiles anew
            start = time.perf_counter()
            losses = np.asarray(program(full, lengths).loss)
            m.seconds += (time.perf_counter() - start) * len(rows) / batch
            m.losses += losses[: len(rows)].astype(np.float64).mean(axis=1).tolist()
            yield m


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
