"""Bases are exact, and spread evenly what is rounded in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xquant_jax.numerics.bases import balance, balanced, basis, hadamard, inverse, rotate, rotated_rows


@pytest.mark.parametrize("size", [1, 2, 8, 12, 64, 96, 100, 128, 384, 576])
def test_rotations_are_orthogonal_and_flat(size: int) -> None:
    matrix = hadamard(size).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    assert np.abs(matrix).max() <= np.sqrt(2 / size) + 1e-6  # no entry carries more than two channels' share


def test_powers_of_two_are_hadamard_matrices() -> None:
    np.testing.assert_allclose(np.abs(hadamard(64)), 1 / 8, rtol=1e-6)


def test_what_is_rotated_and_turned_back_is_the_same_product() -> None:
    rng = np.random.default_rng(0)
    x, matrix = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 24), (2, 24, 7)))
    turned = rotated_rows(jnp.asarray(matrix), 8)
    for own, was in zip(np.asarray(turned), matrix, strict=True):
        np.testing.assert_allclose(rotate(jnp.asarray(x), 8) @ own, x @ was, atol=1e-5)


@pytest.mark.parametrize("heads", [(), (3,)])
def test_balanced_factors_have_the_same_product(heads: tuple[int, ...]) -> None:
    """Also where some directions have no gain at all."""
    rng = np.random.default_rng(1)
    project = rng.standard_normal((20, *heads, 8)).astype(np.float32)
    rebuild = rng.standard_normal((*heads, 8, 10)).astype(np.float32) * 10.0 ** -np.arange(8)[:, None]
    rebuild[..., -1, :] = 0
    down, up = balanced(jnp.asarray(project), jnp.asarray(rebuild))
    product = "dc,cn->dn" if not heads else "dkc,kcn->dkn"
    np.testing.assert_allclose(np.einsum(product, down, up), np.einsum(product, project, rebuild), atol=1e-4)


def test_the_balanced_basis_has_the_least_error_among_others() -> None:
    """tr(A^T C A) tr(A^-1 M A^-T) of the module's docstring, which rounding every channel alike is proportional to."""
    rng = np.random.default_rng(2)
    variance, gain = (10.0 ** rng.uniform(-2, 2, 16) for _ in range(2))

    def error(weight: np.ndarray) -> float:
        return float((variance * weight**2).sum() * (gain / weight**2).sum())

    best = error(np.asarray(balance(jnp.asarray(gain), jnp.asarray(variance))))
    assert best == pytest.approx(np.sqrt(variance * gain).sum() ** 2, rel=0.1)  # the bound of Cauchy and Schwarz
    for other in (np.ones(16), gain**0.5, gain**0.25, variance**-0.5):
        assert best < error(other)


def test_every_channel_of_the_basis_carries_the_same_share() -> None:
    rng = np.random.default_rng(3)
    orthonormal = np.linalg.qr(rng.standard_normal((64, 32)))[0].astype(np.float32)
    rebuild = 10.0 ** rng.uniform(-1, 1, (32, 1)) * np.linalg.qr(rng.standard_normal((32, 32)))[0]
    rebuild = rebuild.astype(np.float32)
    weight = balance(jnp.square(rebuild).sum(1), jnp.ones(32))
    down, up = basis(jnp.asarray(orthonormal), weight), inverse(jnp.asarray(rebuild), weight)
    for share in (jnp.square(down).sum(0), jnp.square(up).sum(1)):
        np.testing.assert_allclose(share, share.mean(), rtol=1e-3)
    assert jax.tree.all(jax.tree.map(lambda a: bool(jnp.isfinite(a).all()), (down, up)))
