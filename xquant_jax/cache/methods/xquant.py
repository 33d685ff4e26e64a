"""XQuant (Tomar et al. 2025, arXiv 2508.10395): the quantized layer input is stored, keys and values rematerialized.

K = H: one stream x of width D, quantized along the token; K = x^ W_k, V = x^ W_v.
K < H: two latents z_k = X U_k (along the channel) and z_v = X U_v (along the token); K = z^_k S_k B_k^T, likewise V,
from the SVD W = U S B^T: of the whole weight (`joint`, the paper's) or of each kv head's part (`per_head`).

With `rotate`, groups of channels of X are stored rotated, and latents in the balanced basis of `numerics.bases`. With
`clip`, the ends of ranges move inwards (`numerics.quantization.clipped`). The paper has neither, and no sink.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import KeyRebuild
from pallas_kernels.eight_bits import TYPES, quantize_matrix
from pallas_kernels.operands import expand
from xquant_jax.cache.methods.base import Absorbed, FactorSource, Method, NewTokens, check_sink
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.bases import rotate, rotated_rows
from xquant_jax.numerics.quantization import StreamSpec, check_bits, default_group

BASES = ("joint", "per_head")
REBUILD_DTYPES = ("bf16", *TYPES)


NARROW = 16
"""Latents of fewer directions are not rotated: the first few of them hold most, and rotated none is small. Of heads of
dimension 8 keys lose (docs/accuracy.md, stories260K); of 64 all gain."""


@dataclasses.dataclass(frozen=True)
class XQuant(Method):
    """X (K = H) or its latents (K < H) at `bits` bits. The bases apply to K < H only, `rebuild_dtype` to K = H only."""

    name: ClassVar[str] = "xquant"
    bits: int = 4
    key_basis: str | None = None  # joint or per_head; None: per_head where K < H
    value_basis: str | None = None
    group: int = 0  # 0: the largest divisor of the width that is not above 128
    input: str = "post_norm"  # or unit_norm: X without the norm's weight, which is folded into the projections
    rebuild_dtype: str = "bf16"  # of the matrix that keys are rebuilt with: bf16 (as the weights are), int8 or fp8
    rotate: bool | None = None  # None: unless latents are narrower than `NARROW`
    clip: bool | None = None  # codes of 2 to 4 bits; None: as `rotate`
    sink: int = 4  # first tokens of a sequence that are kept as they are

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_sink(self.sink)
        if self.rebuild_dtype not in REBUILD_DTYPES:
            raise ConfigError(f"rebuild_dtype={self.rebuild_dtype} is not supported; choose bf16, int8 or fp8")
        if self.rebuild_dtype == "fp8" and self.bits > (most := TYPES["fp8"].code_bits):
            raise ConfigError(
                f"rebuild_dtype=fp8 takes codes of up to {most} bits, which e4m3 holds exactly, and bits={self.bits}; "
                f"choose int8 or bf16"
            )
        if self.input not in ("post_norm", "unit_norm"):
            raise ConfigError(f"input={self.input} is not supported; choose post_norm or unit_norm")
        for option in ("key_basis", "value_basis"):
            basis = getattr(self, option)
            if basis is not None and basis not in BASES:
                raise ConfigError(f"{option}={basis} is not supported; choose {' or '.join(BASES)}")

    def streams(self, config: ModelConfig) -> dict[str, StreamSpec]:
        if config.is_multi_head:
            if self.key_basis or self.value_basis:
                raise ConfigError(
                    "basis applies to grouped-query models; this one has a key/value head per query head, "
                    "and xquant stores X itself: leave basis out"
                )
            return {"x": StreamSpec(config.width, self.bits, "token", self.group, clip=self.clips(config))}
        if self.rebuild_dtype != "bf16":
            raise ConfigError(
                f"rebuild_dtype={self.rebuild_dtype} applies to keys that are stored along the token; those of "
                f"grouped-query models are stored along the channel, so that the matrix would have to be rounded anew "
                f"for every block: leave it out, or choose xquant-cl with rebuild_dtype=int8"
            )
        key, value = (_latent_width(config, basis) for basis in self._bases())
        return {
            "key": StreamSpec(key, self.bits, "channel", clip=self.clips(config)),
            "value": StreamSpec(value, self.bits, "token", self.group, clip=self.clips(config)),
        }

    def rotates(self, config: ModelConfig) -> bool:
        """Whether what is stored is rotated."""
        if self.rotate is not None:
            return self.rotate
        return config.is_multi_head or min(_directions(config, basis) for basis in self._bases()) >= NARROW

    def clips(self, config: ModelConfig) -> bool:
        """Whether ranges are clipped: extremes of what is not rotated matter more than a finer grid."""
        return self.bits < 8 and (self.rotates(config) if self.clip is None else self.clip)

    def by_head(self, config: ModelConfig) -> bool:
        return not config.is_multi_head and self._bases() == ("per_head", "per_head")

    def method_params(self, source: FactorSource, number: int) -> Any:
        params = source.layers
        folded = self.input == "unit_norm"
        if source.config.is_multi_head:
            weights, group = projections(params, folded, number), self.streams(source.config)["x"].group
            if self.rotates(source.config):
                weights = {side: rotated_rows(weight[:number], group) for side, weight in weights.items()}
            method_params = {side: {"rebuild": weight} for side, weight in weights.items()}
            if self.rebuild_dtype != "bf16":
                method_params["key"] = key_factors(method_params["key"]["rebuild"][:number], self.rebuild_dtype, group)
        else:
            key, value = (
                source.svd(basis, folded=folded, number=number, balanced=self.rotates(source.config))
                for basis in self._bases()
            )
            method_params = {"key": dict(key["key"]), "value": dict(value["value"])}
        for side in ("key", "value"):
            if source.config.qkv_bias:
                method_params[side]["bias"] = params[side]["bias"]
        if source.config.qk_norm:
            method_params["key"]["norm"] = params["key_norm"]["scale"]
        return method_params

    def encode(self, method_params: Any, new: NewTokens) -> dict[str, Array]:
        x = new.x if self.input == "post_norm" else unit_norm(new.h, new.norm_eps)
        if "project" not in method_params["key"]:
            return {"x": rotate(x, self.group or default_group(x.shape[-1])) if self.rotate is not False else x}
        down = {side: method_params[side]["project"].reshape(x.shape[-1], -1) for side in ("key", "value")}
        return {side: x @ matrix for side, matrix in down.items()}

    def rebuild(self, method_params: Any, vectors: dict[str, Array], config: ModelConfig) -> tuple[Array, Array]:
        key, value = ("x", "x") if config.is_multi_head else ("key", "value")
        v = expand(vectors[value], method_params["value"]["rebuild"], config.num_kv_heads)
        if config.qkv_bias:
            v = v + split_bias(method_params["value"]["bias"], config)
        return key_rebuild(method_params, config)(vectors[key], config.num_kv_heads), v

    def absorbed(self, method_params: Any, config: ModelConfig) -> Absorbed:
        up = method_params["value"]["rebuild"]
        key, value = ("x", "x") if config.is_multi_head else ("key", "value")

        heads = config.num_kv_heads if up.ndim == 3 else 1
        bias = method_params["value"].get("bias")
        return Absorbed(
            key, key_rebuild(method_params, config), value, heads, lambda out: project_values(out, up, bias, config)
        )

    def _bases(self) -> tuple[str, str]:
        return self.key_basis or "per_head", self.value_basis or "per_head"


def key_factors(matrix: Array, rebuild_dtype: str, group: int) -> dict[str, Array]:
    """Factors of keys from dense matrices [L, C, R] in 8 bits; the stream's groups have `group` channels."""
    small = quantize_matrix(matrix, rebuild_dtype, group)
    return {"rebuild": small["matrix"], "scale": small["scale"], "sums": small["sums"]}


def key_rebuild(method_params: Any, config: ModelConfig) -> KeyRebuild:
    """How the keys of a layer are rebuilt, from its factors."""
    key = method_params["key"]
    small = {name: key[name] for name in ("scale", "sums") if name in key}
    return KeyRebuild(key["rebuild"], key.get("bias"), key.get("norm"), config.norm_eps, **small)


def project_values(out: Array, up: Array, bias: Array | None, config: ModelConfig) -> Array:
    """Absorbed values: (p z^) M_h of every query head, [B, T, H, C] -> [B, T, H, d]; M dense or per head."""
    batch, length, heads, _ = out.shape
    grouped = out.reshape(batch, length, config.num_kv_heads, heads // config.num_kv_heads, -1)
    if up.ndim == 3:
        v = jnp.einsum("btkgc,kcd->btkgd", grouped, up, preferred_element_type=jnp.float32)
    else:
        dense = up.reshape(-1, config.num_kv_heads, config.head_dim)
        v = jnp.einsum("btkgc,ckd->btkgd", grouped, dense, preferred_element_type=jnp.float32)
    if bias is not None:
        v = v + split_bias(bias, config)[:, :, :, None]
    return v.reshape(batch, length, heads, config.head_dim)


def unit_norm(h: Array, eps: float) -> Array:
    """RMS norm without its weight, computed in float32."""
    wide = h.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(h.dtype)


def projections(params: dict[str, Any], folded: bool, number: int) -> dict[str, Array]:
    """Key and value weights [L, D, R]; `folded`: of `number` layers, with the scale of the attention norm multiplied
    into them."""
    weights = {side: params[side]["kernel"] for side in ("key", "value")}
    if not folded:
        return weights
    scale = params["attention_norm"]["scale"][:number, :, None]
    return {side: (scale * weight[:number]).astype(weight.dtype) for side, weight in weights.items()}


def _latent_width(config: ModelConfig, basis: str) -> int:
    """R, or less where the model is narrower than its keys and the SVD has fewer directions."""
    return _directions(config, basis) * (1 if basis == "joint" else config.num_kv_heads)


def _directions(config: ModelConfig, basis: str) -> int:
    """Of one SVD: of all heads' keys, or of one head's."""
    return min(config.width, config.kv_width if basis == "joint" else config.head_dim)


def split_bias(bias: Array, config: ModelConfig) -> Array:
    """[R] -> [1, 1, K, d]."""
    return bias.reshape(1, 1, config.num_kv_heads, config.head_dim)
