"""XQuant-CL (Tomar et al. 2025, arXiv 2508.10395, section 3.3): only the difference of X between layers is stored.

The first layers are stored by plain `xquant`. The last of them is the base of a running sum x^; every later layer
stores the difference of its X to the sum below and adds what is read back of it (a closed loop: errors do not add up).

K = H: dx = X - x^, x^ += dx^.
K < H, `predict=paper`: dz = (X - x^) U_kv, x^ += dz^ U_kv^T, with U_kv of the layer's [W_k | W_v].
K < H, `predict=latent`: z = X A with A = U_kv (`basis=joint`) or the bases of every key/value head's keys and values
side by side (`per_head`); dz = z - z^ M, z^ = z^ M + dz^, where M = A_below^+ A comes from the weights alone. The sum
is 2R wide instead of D. With `rank=r`, M = P P^T A_below^+ A, P being the r principal directions of the layer below on
calibration text; the two factors take 4 * 2R r operations per token.
K < H, `predict=learned`: the same with the M of least squares, found on text by `xquant calibrate`, or else on tokens
drawn at random: what a layer adds to X is in part foreseeable, which the weights of keys and values do not show.

With `rotate`, X is stored in rotated groups of channels, and latents of all heads in the balanced basis of
`numerics.bases`, for the variance of the differences where that is learned.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_kernels import Accumulation
from pallas_kernels.operands import expand, times
from xquant_jax.cache.methods.base import Absorbed, FactorSource, Method, NewTokens, check_sink, clips
from xquant_jax.cache.methods.latents import latent_basis, latents, prediction, stored_width
from xquant_jax.cache.methods.learned import Directions, Need, Prediction
from xquant_jax.cache.methods.xquant import (
    XQuant,
    key_factors,
    key_rebuild,
    project_values,
    projections,
    split_bias,
    unit_norm,
)
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.bases import rotate, rotated_rows
from xquant_jax.numerics.quantization import UNQUANTIZED, StreamSpec, check_bits, default_group

CHOICES = {
    "input": ("post_norm", "unit_norm", "residual"),
    "predict": ("paper", "latent", "learned"),
    "basis": ("joint", "per_head"),
    "accumulator": ("bf16", "int8"),
    "rebuild_dtype": ("bf16", "int8"),
}

WITHOUT_CODES = (("accumulator", "bf16", "int8"), ("input", "residual", "unit_norm"), ("basis", "per_head", "joint"))
"""Options with which keys do not come from codes and a dense matrix, and what would do instead."""


@dataclasses.dataclass(frozen=True)
class XQuantCL(Method):
    """Differences of X between layers at `bits` bits. The last of the `first` layers is the base.

    input: which X: after the norm (`post_norm`), after the norm without its weight, which is folded into the
        projections (`unit_norm`), or before the norm (`residual`, K = H only)
    first: (layers, bits): the layers below the differences and the bits of their streams, typed as 3@4; without it 3@4
        for 2 bits, as in the paper, and one layer of at least 4 bits for more: see `plain`
    predict: K < H only, see above: `learned` by default, or `latent`, or `paper`
    basis, rank: of `predict=latent`, see above; rank=0: all directions, without calibration
    accumulator: how the running sum of the history is held: `bf16` or `int8`
    rebuild_dtype: of the matrix that keys are rebuilt with: `bf16` (as the weights are) or `int8`
    rotate, clip, sink: as in `xquant`; bases of each head (`basis=per_head`) are not rotated
    """

    name: ClassVar[str] = "xquant-cl"
    has_running_sum: ClassVar[bool] = True
    bits: int = 2
    input: str = "unit_norm"
    first: tuple[int, int] | None = None
    predict: str | None = None  # None: learned where K < H, or latent with an option of it
    basis: str | None = None  # None: joint
    rank: int = 0
    accumulator: str = "int8"
    rebuild_dtype: str = "bf16"
    rotate: bool = True
    clip: bool = True
    sink: int = 4

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_sink(self.sink)
        if self.rebuild_dtype == "fp8":
            raise ConfigError("rebuild_dtype=fp8 takes codes of up to 4 bits, a running sum has 8; choose int8 or bf16")
        for option, choices in CHOICES.items():
            value = getattr(self, option)
            if value not in choices and not (option in ("predict", "basis") and value is None):
                raise ConfigError(f"{option}={value} is not supported; choose {' or '.join(choices)}")
        if self.predict in ("paper", "learned") and (self.basis or self.rank):
            option = f"basis={self.basis}" if self.basis else f"rank={self.rank}"
            raise ConfigError(f"{option} applies to predict=latent; leave one of them out")
        for option, value, instead in WITHOUT_CODES:
            if self.rebuild_dtype != "bf16" and getattr(self, option) == value:
                raise ConfigError(
                    f"rebuild_dtype={self.rebuild_dtype} multiplies the codes of the running sum with one dense "
                    f"matrix, which {option}={value} does not; choose {option}={instead}, or leave one of them out"
                )
        if self.first == _first(self.bits):
            object.__setattr__(self, "first", None)  # one way to say it
        if self.rank < 0:
            raise ConfigError(f"rank={self.rank} is not possible; choose 1 or more, or 0 for all directions")

    @property
    def plain(self) -> tuple[int, int]:
        """How many layers lie below the differences, and their bits. Errors of plain layers add up, and those of
        differences do not: with as many bits, a second plain layer is worse than a difference."""
        return self.first or _first(self.bits)

    def with_bits(self, bits: int) -> "XQuantCL":
        return dataclasses.replace(self, bits=bits, first=self.plain)

    def layers(self, config: ModelConfig) -> list[tuple[Method, int]]:
        """Plain layers, the base of the running sum, and the differences."""
        plain, bits = self.plain
        if not 0 < plain < config.num_layers:
            raise ConfigError(
                f"first={plain}@{bits}: the model has {config.num_layers} layers, and xquant-cl needs one for its base "
                f"and at least one above"
            )
        basis = None if config.is_multi_head else "joint"
        base = Base(**{**vars(self), "bits": bits})
        folded = "post_norm" if self.input == "post_norm" else "unit_norm"
        rebuild = self.rebuild_dtype if config.is_multi_head else "bf16"  # latents' keys lie along the channel
        shared = {"input": folded, "rotate": self.rotate, "clip": self.clip, "sink": self.sink}
        plainly = XQuant(bits, basis, basis, rebuild_dtype=rebuild, **shared)
        below = [(plainly, plain - 1)] if plain > 1 else []
        return [*below, (base, 1), (self, config.num_layers - plain)]

    def streams(self, config: ModelConfig) -> dict[str, StreamSpec]:
        self._check(config)
        return {"delta": StreamSpec(stored_width(config, self.basis), self.bits, "token", clip=clips(self))}

    def window(self, config: ModelConfig) -> dict[str, tuple[int, str]]:
        return {"x": (self._running_width(config), "bfloat16")}

    def running_sum(self, config: ModelConfig) -> StreamSpec:
        bits = UNQUANTIZED if self.accumulator == "bf16" else 8
        return StreamSpec(self._running_width(config), bits, "token")

    def needs(self, config: ModelConfig) -> tuple[Need, ...]:
        if self.rank:
            return (Directions(self.basis or "joint", self.input == "unit_norm", self.rank),)
        return (Prediction(self.input == "unit_norm"),) if self._learned(config) else ()

    def method_params(self, source: FactorSource, number: int) -> Any:
        params, config = source.layers, source.config
        folded = self.input != "post_norm"
        weights = projections(params, folded, number)
        if self._latent(config):
            method_params = self._of_latents(source, weights, number)
        else:
            method_params = {side: {"rebuild": weight} for side, weight in weights.items()}
            if not config.is_multi_head:
                method_params["basis"] = source.svd("kv", folded=folded, number=number)["basis"]
                if self.rotate:
                    width = stored_width(config, self.basis)
                    method_params["basis"] = lax.map(lambda own: rotate(own, width), method_params["basis"][:number])
            elif self.rotate:
                group = self.running_sum(config).group
                method_params = {s: {"rebuild": rotated_rows(w[:number], group)} for s, w in weights.items()}
        if self.rebuild_dtype != "bf16":
            group = self.running_sum(config).group
            method_params["key"] = key_factors(method_params["key"]["rebuild"][:number], self.rebuild_dtype, group)
        if config.qkv_bias:
            for side in ("key", "value"):
                method_params[side]["bias"] = params[side]["bias"]
        if config.qk_norm:
            method_params["key"]["norm"] = params["key_norm"]["scale"]
        return method_params

    def _of_latents(self, source: FactorSource, weights: dict[str, Array], number: int) -> dict[str, Any]:
        """Basis, prediction, and what keys and values are rebuilt with, of methods whose sum is that of latents."""
        folded, per_head = self.input != "post_norm", self.basis == "per_head"
        found = {need: source.calibrated(need) for need in self.needs(source.config)}
        project = latent_basis(source, self.basis or "joint", folded=folded, number=number)
        variance = np.ones(project.shape[::2], np.float32)
        match [*found.items()]:
            case [(Directions(), directions)]:
                predict = tuple(directions[part] for part in ("down", "up"))
            case [(Prediction(), learned)]:
                predict, variance = (np.asarray(learned["predict"]),), np.asarray(learned["residual"])[: len(project)]
            case _:
                predict = (np.asarray(prediction(project, not per_head), np.float32),)
        if per_head:
            own = source.svd("per_head", folded=folded, number=number)
            rebuild = {side: own[side]["rebuild"] for side in ("key", "value")}
        else:
            both = {side: weight[: len(project)] for side, weight in weights.items()}
            predict = tuple(part[: len(project)] for part in predict)
            project, predict, rebuild = latents(project, predict, both, variance if self.rotate else None)
        dtype = weights["key"].dtype
        return {
            "basis": project.astype(dtype),
            "predict": tuple(jnp.asarray(part, dtype) for part in predict),
            **{side: {"rebuild": matrix.astype(dtype)} for side, matrix in rebuild.items()},
        }

    def encode(self, method_params: Any, new: NewTokens) -> dict[str, Array]:
        match self.input:
            case "post_norm":
                x = new.x
            case "unit_norm":
                x = unit_norm(new.h, new.norm_eps)
            case _:
                x = new.h
        if "predict" in method_params:
            return {"x": x @ method_params["basis"]}
        turned = self.rotate and "basis" not in method_params
        return {"x": rotate(x, default_group(x.shape[-1])) if turned else x}

    def store(self, method_params: Any, window: dict[str, Array], predicted: Array | None) -> dict[str, Array]:
        assert predicted is not None
        difference = window["x"].astype(jnp.float32) - predicted
        return {"delta": self._project(method_params, difference)}

    def accumulation(self, method_params: Any) -> Accumulation:
        return Accumulation(method_params.get("predict", ()), self._lift(method_params))

    def rebuild(self, method_params: Any, vectors: dict[str, Array], config: ModelConfig) -> tuple[Array, Array]:
        absorbed = self.absorbed(method_params, config)
        vectors = absorbed.prepare(vectors) if absorbed.prepare else vectors
        v = expand(vectors[absorbed.value], method_params["value"]["rebuild"], config.num_kv_heads)
        if config.qkv_bias:
            v = v + split_bias(method_params["value"]["bias"], config)
        return absorbed.key_rebuild(vectors[absorbed.key], config.num_kv_heads), v

    def absorbed(self, method_params: Any, config: ModelConfig) -> Absorbed:
        value = method_params["value"]

        def normed(vectors: dict[str, Array]) -> dict[str, Array]:
            return {"x": unit_norm(vectors["x"], config.norm_eps)}

        def halves(vectors: dict[str, Array]) -> dict[str, Array]:
            return dict(zip(("key", "value"), jnp.split(vectors["x"], 2, axis=-1), strict=True))

        per_head = self.basis == "per_head"
        return Absorbed(
            key="key" if per_head else "x",
            key_rebuild=key_rebuild(method_params, config),
            value="value" if per_head else "x",
            value_heads=config.num_kv_heads if per_head else 1,
            project=lambda out: project_values(out, value["rebuild"], value.get("bias"), config),
            prepare=normed if self.input == "residual" else halves if per_head else None,
        )

    def _check(self, config: ModelConfig) -> None:
        options = {"predict": self.predict, "basis": self.basis, "rank": self.rank}
        given = [f"{option}={value}" for option, value in options.items() if value]
        if config.is_multi_head and given:
            raise ConfigError(f"{given[0]} applies to grouped-query models; leave it out for this one")
        if not config.is_multi_head and self.input == "residual":
            raise ConfigError("input=residual applies to models with a key/value head per query head only (K = H)")
        if self.rank > stored_width(config, self.basis):
            raise ConfigError(f"rank={self.rank}: the latent has {stored_width(config, self.basis)} directions")

    def _running_width(self, config: ModelConfig) -> int:
        return stored_width(config, self.basis) if self._latent(config) else config.width

    def _learned(self, config: ModelConfig) -> bool:
        return self._latent(config) and self.predict != "latent" and not (self.basis or self.rank)

    def _latent(self, config: ModelConfig) -> bool:
        """Whether the running sum is that of latents."""
        return not config.is_multi_head and self.predict != "paper"

    def _project(self, method_params: Any, x: Array) -> Array:
        """From the running sum's space to that of the stream."""
        return times(x, method_params["basis"]) if self._has_basis(method_params) else x

    def _lift(self, method_params: Any) -> Array | None:
        return method_params["basis"].T if self._has_basis(method_params) else None

    def _has_basis(self, method_params: Any) -> bool:
        return "basis" in method_params and "predict" not in method_params


class Base(XQuantCL):
    """The layer that the running sum starts with: stored itself, along the token."""

    def streams(self, config: ModelConfig) -> dict[str, StreamSpec]:
        self._check(config)
        return {"base": StreamSpec(stored_width(config, self.basis), self.bits, "token", clip=clips(self))}

    def store(self, method_params: Any, window: dict[str, Array], predicted: Array | None) -> dict[str, Array]:
        return {"base": self._project(method_params, window["x"].astype(jnp.float32))}

    def accumulation(self, method_params: Any) -> Accumulation:
        return Accumulation(None, self._lift(method_params))


def _first(bits: int) -> tuple[int, int]:
    return (3, 4) if bits == 2 else (1, max(4, bits))
