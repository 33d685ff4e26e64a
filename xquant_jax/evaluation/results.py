"""What `xquant eval` found: losses, divergences and agreement of every window, and the figures that follow."""

import dataclasses
import math
from typing import Any

import numpy as np

from xquant_jax.cache.state import CacheBytes
from xquant_jax.errors import ConfigError

IDENTITY = ("model", "weights", "text", "seq_len", "protocol", "chunk", "dtype", "text_sha256")
"""Fields of `Evaluation` that say what is measured, and that a JSON begins with."""

WINDOWS = {"window_nlls": "losses", "window_kl_divergences": "divergences", "window_top1_agreements": "agreements"}
"""Lists of one figure per window: their names in a JSON, and in `Measurement`."""


@dataclasses.dataclass
class Measurement:
    """One method's results so far.

    cache: the spec as it was typed
    paper_ratio: size of a cached token, relative to keys and values of 16 bits; its share of the first tokens that are
        kept as they are included
    allocated: what a cache for one window takes
    losses: mean nats per predicted token, of each window in turn
    divergences: of each window, the mean Kullback-Leibler divergence from the model without a cache, in nats per token
    agreements: of each window, the share of tokens at which the likeliest one is that of the model without a cache
    differing: of each continuation, the places at which another token is the likeliest; None: not looked at
    seconds: what the windows took, compilation aside
    calibration: hash of the file whose levels or directions the method takes, if it takes any
    """

    cache: str
    paper_ratio: float
    allocated: CacheBytes
    losses: list[float] = dataclasses.field(default_factory=list)
    divergences: list[float] = dataclasses.field(default_factory=list)
    agreements: list[float] = dataclasses.field(default_factory=list)
    differing: list[list[int]] | None = None
    seconds: float = 0.0
    calibration: str | None = None


@dataclasses.dataclass
class Evaluation:
    """A run: what is measured on what, and the measurements so far.

    weights: the model's fingerprint
    chunk: tokens fed at once in protocol "streaming"
    predicted_bytes: of each window, how many bytes of text its tokens 2 ... N stand for
    baseline: the model without a cache
    continuations: the tokens that the model without a cache continues each window with, if that was asked for
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
    continuations: list[list[int]] = dataclasses.field(default_factory=list)

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
            "kl_divergence": _mean(m.divergences),
            "top1_agreement": _mean(m.agreements),
            "bits_per_byte": float(nll * tokens * count / math.log(2) / total_bytes) if total_bytes else math.nan,
            "paper_ratio": m.paper_ratio,
            "allocated_bytes": m.allocated.total,
            "tokens_per_second": count * self.seq_len / m.seconds if m.seconds else math.nan,
        }
        if length := self.generated:
            differing = m.differing or []
            numbers["first_divergence"] = _median([min(places, default=length) for places in differing])
            numbers["continuation_agreement"] = _mean([1 - len(places) / length for places in differing])
        return {"cache": m.cache} | {name: n if math.isfinite(n) else None for name, n in numbers.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything, losses of each window included, so that `from_json` can continue."""

        def full(m: Measurement) -> dict[str, Any]:
            return self.row(m) | {
                "allocated": dataclasses.asdict(m.allocated),
                "seconds": m.seconds,
                "calibration": m.calibration,
                "differing": m.differing,
                **{name: [x if math.isfinite(x) else None for x in getattr(m, part)] for name, part in WINDOWS.items()},
            }

        return self.identity() | {
            "predicted_bytes": self.predicted_bytes,
            "baseline": full(self.baseline),
            "rows": [full(m) for m in self.measurements],
            "continuations": self.continuations,
        }

    @classmethod
    def from_json(cls, document: Any) -> "Evaluation":
        """What `to_json` wrote. Raises `ConfigError` for anything else."""

        def measurement(row: Any) -> Measurement:
            if len({len(row[name]) for name in WINDOWS}) != 1:
                raise ValueError(f"{row['cache']} has figures of more windows than others")
            return Measurement(
                row["cache"],
                float(row["paper_ratio"]),
                CacheBytes(**row["allocated"]),
                **{part: [math.nan if x is None else float(x) for x in row[name]] for name, part in WINDOWS.items()},
                differing=row["differing"],
                seconds=float(row["seconds"]),
                calibration=row["calibration"],
            )

        try:
            return cls(
                **{name: document[name] for name in IDENTITY},
                predicted_bytes=document["predicted_bytes"],
                baseline=measurement(document["baseline"]),
                measurements=[measurement(row) for row in document["rows"]],
                continuations=document["continuations"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"this JSON was not written by xquant eval ({error!r}); choose another file") from error

    @property
    def generated(self) -> int:
        """Tokens of each continuation; 0: there is none."""
        return len(self.continuations[0]) if self.continuations else 0

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
        self.continuations = earlier.continuations
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

    def renew(self, continuations: list[list[int]]) -> None:
        """Other continuations: nothing is known of how the caches differ from them."""
        self.continuations = continuations
        for m in (self.baseline, *self.measurements):
            m.differing = None


def _mean(figures: list[float]) -> float:
    return float(np.mean(figures)) if figures else math.nan


def _median(figures: list[int]) -> float:
    return float(np.median(figures)) if figures else math.nan
