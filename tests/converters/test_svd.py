"""Factors of the projections: exact, orthonormal and the same every time."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from converters.families import model_config
from converters.svd import (
    FACTOR_KINDS,
    factor_kinds,
    factor_shapes,
    joint_factors,
    kv_basis,
    layer_factors,
    per_head_factors,
)
from xquant_jax.errors import ConfigError
from xquant_jax.parameters import leaves_of

HEADS = 3
# (D, R): common, square, R above D (small models with wide heads), a head wider than the model
SHAPES = [(96, 48), (48, 48), (32, 48), (12, 48)]


def weight(shape, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    spectrum = np.geomspace(1.0, 1e-4, shape[1])  # as trained weights, far from equal singular values
    return (random.standard_normal(shape) * spectrum @ random.standard_normal((shape[1],) * 2)).astype(dtype)


def relative_error(found, expected):
    expected = expected.astype(np.float64)
    return np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)


def orthonormality_error(basis):
    product = basis.T.astype(np.float64) @ basis.astype(np.float64)
    return np.abs(product - np.eye(product.shape[0])).max()


# One float32 rounding of U and of Sigma B^T, 6e-8 each, is all that may be lost.
TOLERANCE = 3e-7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_joint_factors_rebuild_the_weight(shape, dtype):
    w = weight(shape, dtype=dtype)
    factors = joint_factors(w)
    rank = min(shape)
    assert factors["project"].shape == (shape[0], rank)
    assert factors["rebuild"].shape == (rank, shape[1])
    assert factors["project"].dtype == factors["rebuild"].dtype == np.float32
    assert relative_error(factors["project"].astype(np.float64) @ factors["rebuild"], w) < TOLERANCE
    assert orthonormality_error(factors["project"]) < TOLERANCE


def test_rows_of_up_are_the_singular_directions_in_order():
    w = weight((96, 48))
    lengths = np.linalg.norm(joint_factors(w)["rebuild"], axis=1)
    assert lengths == pytest.approx(np.linalg.svd(w.astype(np.float64), compute_uv=False), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_per_head_factors_rebuild_every_head(shape):
    w = weight(shape)
    factors = per_head_factors(w, HEADS)
    d = shape[1] // HEADS
    rank = min(shape[0], d)
    assert factors["project"].shape == (shape[0], HEADS, rank)
    assert factors["rebuild"].shape == (HEADS, rank, d)
    for head in range(HEADS):
        basis = factors["project"][:, head]
        rebuilt = basis.astype(np.float64) @ factors["rebuild"][head]
        assert relative_error(rebuilt, w[:, head * d : (head + 1) * d]) < TOLERANCE
        assert orthonormality_error(basis) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_kv_basis_spans_keys_and_values(shape):
    key, value = weight(shape, 1), weight(shape, 2)
    basis = kv_basis(key, value)["basis"]
    assert basis.shape == (shape[0], min(shape[0], 2 * shape[1]))
    assert orthonormality_error(basis) < TOLERANCE
    for w in (key, value):
        assert relative_error(basis.astype(np.float64) @ (basis.T.astype(np.float64) @ w), w) < TOLERANCE


def test_kv_basis_is_ordered_by_importance():
    key, value = weight((96, 24), 1), weight((96, 24), 2)
    basis = kv_basis(key, value)["basis"].astype(np.float64)
    captured = np.linalg.norm(basis.T @ np.concatenate([key, value], axis=1), axis=1)
    assert np.all(np.diff(captured) < 0)


def test_a_rank_deficient_weight_still_gives_an_orthonormal_basis():
    w = weight((96, 48))
    w[:, 24:] = w[:, :24]
    factors = joint_factors(w)
    assert orthonormality_error(factors["project"]) < TOLERANCE
    assert relative_error(factors["project"].astype(np.float64) @ factors["rebuild"], w) < TOLERANCE


@pytest.fixture
def grouped(tiny_config):
    return model_config(tiny_config("llama"))


def random_layer(config):
    shape = (config.width, config.kv_width)
    scale = np.linspace(0.5, 2, config.width, dtype=np.float32)
    return {
        "key": {"kernel": weight(shape, 3)},
        "value": {"kernel": weight(shape, 4)},
        "attention_norm": {"scale": scale},
    }


def test_factors_of_a_layer(grouped):
    layer = random_layer(grouped)
    factors = layer_factors(FACTOR_KINDS, layer, grouped)
    assert tuple(factors) == FACTOR_KINDS
    for kind in FACTOR_KINDS:
        shapes = {path: leaf.shape for path, leaf in leaves_of(factors[kind]).items()}
        assert shapes == factor_shapes(kind, grouped)
    key, value = layer["key"]["kernel"], layer["value"]["kernel"]
    assert np.array_equal(factors["joint"]["value"]["rebuild"], joint_factors(value)["rebuild"])
    assert np.array_equal(factors["per_head"]["key"]["project"], per_head_factors(key, 2)["project"])
    scale = layer["attention_norm"]["scale"][:, None]
    folded = [scale.astype(np.float64) * w.astype(np.float64) for w in (key, value)]
    assert np.array_equal(factors["kv"]["basis"], kv_basis(*folded)["basis"])


def test_the_norm_is_folded_in_where_asked(grouped):
    layer = random_layer(grouped)
    folded = layer_factors(["joint"], layer, grouped, folded=True)["joint"]["key"]
    expected = layer["attention_norm"]["scale"][:, None] * layer["key"]["kernel"]
    assert relative_error(folded["project"] @ folded["rebuild"], expected) < 1e-6
    plain = layer_factors(["kv"], layer, grouped, folded=False)["kv"]
    assert np.array_equal(plain["basis"], kv_basis(layer["key"]["kernel"], layer["value"]["kernel"])["basis"])


def test_multi_head_models_have_no_factors(grouped):
    multi_head = dataclasses.replace(grouped, num_kv_heads=grouped.num_heads)
    assert factor_kinds(multi_head) == ()
    with pytest.raises(ConfigError, match=r"factors='joint' do not exist.*num_key_value_heads=4"):
        layer_factors(["joint"], random_layer(multi_head), multi_head)
