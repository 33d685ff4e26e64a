"""Factors of the key and value projections: what XQuant projects the attention input X to, and back from.

With the thin, full-rank SVD W = U Σ Bᵀ, X U is stored and K = (X U)(Σ Bᵀ) is rebuilt: exact, nothing
truncated (XQuant, arXiv 2508.10395, the section on grouped-query attention). LAPACK runs in float64, the factors are
float32. Signs of singular vectors are arbitrary, and are left as LAPACK gives them; others redraw the quantization
noise of the latents.

Shape letters: D model width, R = K d width of keys and of values, r = min(D, R), e = min(D, d).
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.parameters import Tree

FactorKind = Literal["joint", "per_head", "kv"]
FACTOR_KINDS: tuple[FactorKind, ...] = get_args(FactorKind)

FACTORIZED = ("attention_norm.scale", "key.kernel", "value.kernel")
"""The parameters of a layer that its factors are made of."""

FOLDED: dict[FactorKind, bool] = {"joint": False, "per_head": False, "kv": True}
"""Whether the methods' defaults take a kind of the weights with the scale of the attention norm multiplied in."""


def joint_factors(weight: Float[np.ndarray, "D R"]) -> dict[str, Float[np.ndarray, "..."]]:
    """One SVD of the whole projection: `project` = U [D, r], `rebuild` = Σ Bᵀ [r, R]; project @ rebuild = weight."""
    basis, values, right = _svd(weight)
    return {"project": _float32(basis), "rebuild": _float32(values[:, None] * right)}


def per_head_factors(weight: Float[np.ndarray, "D R"], num_heads: int) -> dict[str, Float[np.ndarray, "..."]]:
    """One SVD per head: `project` = U_h [D, K, e], `rebuild` = Σ_h B_hᵀ [K, e, d]; project_h @ rebuild_h = weight_h."""
    width, total = weight.shape
    heads = weight.reshape(width, num_heads, total // num_heads).swapaxes(0, 1)  # [K, D, d]
    basis, values, right = _svd(heads)
    return {"project": _float32(basis.swapaxes(0, 1)), "rebuild": _float32(values[..., None] * right)}


def kv_basis(key: Float[np.ndarray, "D R"], value: Float[np.ndarray, "D R"]) -> dict[str, Float[np.ndarray, "D N"]]:
    """`basis` = U_kv of [W_k | W_v], [D, min(D, 2R)]: the latent space of keys and values (XQuant-CL)."""
    basis, _, _ = _svd(np.concatenate([key, value], axis=1))
    return {"basis": _float32(basis)}


def layer_factors(
    kinds: Iterable[FactorKind], layer: Tree, config: ModelConfig, *, folded: bool | None = None
) -> dict[FactorKind, Tree]:
    """The factors of one layer, of several kinds at once, from its parameter tree.

    All kinds take 8 s of one core for a layer of Llama-3.1-8B; they run side by side.

    Args:
        kinds: some of `joint`, `per_head` and `kv`.
        layer: holds `key.kernel` and `value.kernel`, [D, R], and `attention_norm.scale`, [D].
        folded: whether the norm's scale is multiplied into the weights first; None: as is most used, and converted
            checkpoints have it, which is `FOLDED`.

    Raises:
        ConfigError: an unknown kind, or a model with K = H, which needs none.
    """
    kinds = tuple(kinds)
    for kind in kinds:
        require_kind(kind, config)
    heads = config.num_kv_heads

    def compute(kind: FactorKind) -> Tree:
        key, value = layer["key"]["kernel"], layer["value"]["kernel"]
        if FOLDED[kind] if folded is None else folded:
            norm = np.asarray(layer["attention_norm"]["scale"], np.float64)[:, None]
            key, value = norm * key.astype(np.float64), norm * value.astype(np.float64)
        match kind:
            case "kv":
                return kv_basis(key, value)
            case "joint":
                return {"key": joint_factors(key), "value": joint_factors(value)}
            case "per_head":
                return {"key": per_head_factors(key, heads), "value": per_head_factors(value, heads)}

    # BLAS threads spin while they wait, and cost a busy machine many times what they gain; the kinds run side by side
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(len(FACTOR_KINDS)) as pool:
        return dict(zip(kinds, pool.map(compute, kinds), strict=True))


def factor_kinds(config: ModelConfig) -> tuple[FactorKind, ...]:
    """The kinds of factors that a model has: all for grouped queries (K < H), none for multi-head (K = H)."""
    return () if config.is_multi_head else FACTOR_KINDS


def require_kind(kind: str, config: ModelConfig) -> None:
    """ConfigError unless the model has factors of this kind."""
    kinds = factor_kinds(config)
    if kind not in kinds:
        raise ConfigError(
            f"factors={kind!r} do not exist for this model; it has {', '.join(kinds) or 'none'} "
            f"(num_attention_heads={config.num_heads}, num_key_value_heads={config.num_kv_heads})"
        )


def factor_shapes(kind: FactorKind, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every float32 leaf of one layer's factors, by path."""
    width, total, heads, d = config.width, config.kv_width, config.num_kv_heads, config.head_dim
    if kind == "kv":
        return {"basis": (width, min(width, 2 * total))}
    if kind == "joint":
        rank = min(width, total)
        shapes = {"project": (width, rank), "rebuild": (rank, total)}
    else:
        rank = min(width, d)
        shapes = {"project": (width, heads, rank), "rebuild": (heads, rank, d)}
    return {f"{part}.{name}": shape for part in ("key", "value") for name, shape in shapes.items()}


def _svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, Σ and Bᵀ of the last two axes in float64, thin."""
    return np.linalg.svd(matrix.astype(np.float64), full_matrices=False)


def _float32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)
