"""Cache specs: what users type, and the errors that name the part that cannot be honoured."""

import pytest

from tests.conftest import tiny_config
from xquant_jax.errors import ConfigError
from xquant_jax.methods import CacheConfig
from xquant_jax.methods.bf16 import BF16
from xquant_jax.methods.int8 import Int8
from xquant_jax.methods.xquant import XQuant


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("bf16", BF16()),
        ("bf16,dtype=float32", BF16(dtype="float32")),
        ("int8", Int8()),
        ("int8,group=16", Int8(group=16)),
        ("xquant", XQuant(bits=4)),
        ("xquant:2", XQuant(bits=2)),
        ("xquant:3,basis=joint", XQuant(bits=3, key_basis="joint", value_basis="joint")),
        ("xquant:8,value_basis=joint,group=8", XQuant(bits=8, value_basis="joint", group=8)),
    ],
)
def test_spec_names_a_method_and_its_options(spec: str, method: object) -> None:
    assert CacheConfig.parse(spec) == CacheConfig(method)


def test_first_layers_may_have_other_bits() -> None:
    segments = CacheConfig.parse("xquant:2,first=3@4").segments(tiny_config(num_layers=5, sliding_windows=(None,) * 5))
    assert segments == [(XQuant(bits=4), 3), (XQuant(bits=2), 2)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("h2o", "cache method 'h2o' is not known; choose one of bf16, int8, xquant"),
        ("xquant:5", "bits=5 is not supported; choose 2, 3, 4 or 8"),
        ("xquant:four", "bits=four is not a whole number"),
        ("xquant:4,basis", "option 'basis' .* has no value"),
        ("xquant:4,basis=shared", "key_basis=shared is not supported; choose joint or per_head"),
        (
            "xquant:4,rank=3",
            "xquant has no option 'rank'; it has bits, key_basis, value_basis, group, basis, first",
        ),
        ("int8:4", "int8 has no option 'bits'"),
        ("int8,first=1@4", "int8 has a fixed width"),
        ("bf16,dtype=int4", "dtype=int4 is not supported"),
        ("xquant:4,group=5", "group=5 does not divide the stream's width 16; these do: .1, 2, 4, 8, 16."),
        ("xquant:2,first=2@4", "first=2@4: the model has 2 layers"),
        ("xquant:16", "bits=16 is not supported"),
        ("xquant:2,first=1@16", "bits=16 is not supported"),
        ("xquant:", "bits= is not a whole number"),
        ("xquant:4,bits=2", "option bits is given twice"),
        ("xquant:4,basis=joint,basis=per_head", "option basis is given twice"),
        ("xquant:2,first=2", "first=2 must be LAYERS@BITS"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_that_names_it(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig.parse(spec).segments(tiny_config())


def test_a_basis_does_not_apply_to_multi_head_models() -> None:
    with pytest.raises(ConfigError, match="basis applies to grouped-query models"):
        CacheConfig.parse("xquant:4,basis=joint").segments(tiny_config(num_kv_heads=4))
