"""What fits on a device and how fast it can be, for every cache method, from shapes alone.

Bytes are those of the arrays that a model, its factors and a cache would be. Operations are counted in the program
that would run (`xquant_jax.planning.counting`): rebuilding keys, absorbing values and summing differences included.
Times are a roofline: what is rebuilt stays on the chip, arithmetic and memory overlap perfectly, weights are read once
a step. No program is faster; docs/plan.md says how far ours are from it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converters.families import model_config
from converters.shards import read_json
from xquant_jax.cache.config import METHODS, CacheConfig
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.model.loading import DEMO
from xquant_jax.numerics.packing import PLANES
from xquant_jax.planning.costs import CHUNK, Costs
from xquant_jax.planning.devices import Device
from xquant_jax.planning.row import Row
from xquant_jax.speculation import Speculation

BASELINE = "bf16"

RESERVE = 0.1
"""Share of a device's memory that is left to temporaries and the runtime."""

ACCEPTANCE = 0.8
"""Probability that a drafted token is accepted, where none is given."""

PAPER_RIDGE = 756e12 / 2e12
"""FLOP per byte of the device in section 3.4 of the XQuant paper."""


def read_config(model: str | Path) -> ModelConfig:
    """The model of a directory, of "demo", or of a `config.json` without weights; its weights in bfloat16.

    Raises `CheckpointError` for a file that cannot be read, `ConfigError` for a model that is not supported.
    """
    path = DEMO if str(model) == "demo" else Path(model)
    config = model_config(read_json(path / "config.json" if path.is_dir() else path))
    return dataclasses.replace(config, dtype="bfloat16")


def default_specs(config: ModelConfig) -> list[str]:
    """Every method at every bit width that it has, and the other forms of XQuant for grouped queries."""
    low_rank = f",basis=per_head,rank={config.kv_width // 4}"
    forms = {"xquant": ("", ",basis=joint"), "xquant-cl": ("", ",predict=paper", low_rank)}
    forms = {} if config.is_multi_head else forms
    specs = []
    for name, method in METHODS.items():
        if "bits" not in {field.name for field in dataclasses.fields(method)}:  # pyright: ignore[reportArgumentType]
            specs.append(name)
            continue
        for form in forms.get(name, ("",)):
            specs += [f"{name}:{bits}{form}" for bits in PLANES if _has(f"{name}:{bits}{form}", config)]
    return specs


def _has(spec: str, config: ModelConfig) -> bool:
    """Whether the method has this width at all."""
    try:
        CacheConfig.parse(spec).segments(config)
    except ConfigError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every method costs and how fast it is, at one context and batch on one device.

    chunk: prompt tokens fed at once
    usable: bytes of the device's memory that weights and cache may take
    parameters: how many numbers the model has
    speculation: where the drafts of `Row.speculating` come from; None without
    acceptance: with what probability one of their tokens is accepted if those before it are; None without
    baseline: the row of bf16, which speeds are relative to
    hidden_below: the limit of `hidden_below` by bits on this device
    hidden_below_in_paper: the same on the paper's device, at 2 bits
    """

    model: str
    device: Device
    context: int
    batch: int
    chunk: int
    usable: int
    parameters: int
    speculation: Speculation | None
    acceptance: float | None
    baseline: Row
    rows: list[Row]
    hidden_below: dict[str, float | None]
    hidden_below_in_paper: float | None

    def speed(self, row: Row) -> float:
        """Decoding speed relative to bf16 at the same context and batch, memory aside."""
        return self.baseline.decode.seconds / row.decode.seconds

    def to_json(self) -> dict[str, Any]:
        """All figures, with the speed of every row relative to bf16 and the names of those that are slower."""
        device = dataclasses.asdict(self.device) | {"ridge": self.device.ridge}
        rows = [dataclasses.asdict(row) | {"speed_over_bf16": self.speed(row)} for row in self.rows]
        return dataclasses.asdict(self) | {
            "device": device,
            "speculation": str(self.speculation) if self.speculation else None,
            "rows": rows,
            "slower_than_bf16": [row.cache for row in self.rows if self.speed(row) < 1],
        }


def plan(
    config: ModelConfig,
    device: Device,
    *,
    context: int,
    batch: int,
    specs: Sequence[str] | None = None,
    model: str = "",
    chunk: int = CHUNK,
    reserve: float = RESERVE,
    speculate: str | Speculation | None = None,
    acceptance: float | None = None,
) -> Plan:
    """Every method of `specs` (by default all there are) on one device, with `context` tokens in each of `batch` rows.

    speculate: as in `Speculation.parse`; acceptance: the probability that a drafted token is accepted if those before
        it are, by default `ACCEPTANCE`

    Raises `ConfigError` for sizes that are not possible, and for weights that alone are too large.
    """
    speculation = Speculation.parse(speculate)
    if speculation is None and acceptance is not None:
        raise ConfigError(f"acceptance={acceptance} is of drafts, and there are none; give speculate too (lookup:4)")
    if acceptance is None:
        acceptance = ACCEPTANCE
    if not 0 <= acceptance <= 1:
        raise ConfigError(f"acceptance={acceptance} is not a probability; choose 0 to 1")
    for name, value in (("context", context), ("batch", batch), ("chunk", chunk)):
        if value < 1:
            raise ConfigError(f"{name}={value} is not possible; choose 1 or more")
    if not 0 <= reserve < 1:
        raise ConfigError(f"reserve={reserve} is not a share of the memory; choose 0 or more and less than 1")
    usable = int(device.memory * (1 - reserve))
    baseline = Costs(config, CacheConfig.parse(BASELINE), chunk)
    if baseline.weights > usable:
        raise ConfigError(
            f"the weights take {gib(baseline.weights)}, and of the {gib(device.memory)} of a {device.name} "
            f"{gib(usable)} can be used: {gib(baseline.weights - usable)} too much; choose a larger device, or a mesh "
            f"of several (scripts/aot_compile.py)"
        )
    costs = [Costs(config, CacheConfig.parse(spec), chunk) for spec in specs or default_specs(config)]
    sizes = (device, usable, context, batch, speculation, acceptance)
    return Plan(
        model=model,
        device=device,
        context=context,
        batch=batch,
        chunk=chunk,
        usable=usable,
        parameters=baseline.parameters,
        speculation=speculation,
        acceptance=acceptance if speculation else None,
        baseline=baseline.row(*sizes),
        rows=[cost.row(*sizes) for cost in costs],
        hidden_below={f"{bits} bits": hidden_below(config, device.ridge, bits) for bits in (2, 4)},
        hidden_below_in_paper=hidden_below(config, PAPER_RIDGE, 2),
    )


def hidden_below(config: ModelConfig, ridge: float, bits: int) -> float | None:
    """Cached tokens up to which rebuilding keys and values hides behind loading a layer's weights; None: any number.

    XQuant paper, section 3.4, for one sequence and both keys and values rebuilt (ours absorbs values), with ridge P:
    4 l D^2 = P (e/8 l D + 24 D^2) for multi-head models, 4 l R^2 = P (e/8 l R + 26 D^2 + 4 R^2) for grouped queries.
    """
    D, R = config.width, config.kv_width
    weights = 24 * D**2 if config.is_multi_head else 26 * D**2 + 4 * R**2
    excess = 4 * R**2 - ridge * bits / 8 * R  # operations of a token above those that fit beside loading it
    return ridge * weights / excess if excess > 0 else None


def without_bits(spec: str) -> tuple[str, int | None]:
    """A spec without its bits, and these: what rows that differ in nothing else have in common."""
    head, *options = spec.split(",")
    name, _, bits = head.partition(":")
    return ",".join([name, *options]), int(bits.split(";")[0]) if bits else None


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.1f} GiB"
