"""Cache specs: what users type, and the errors that name the part that cannot be honoured."""

import pytest

from tests.conftest import tiny_config
from xquant_jax.cache.config import CacheConfig, LayerBits, Method
from xquant_jax.cache.methods.bf16 import BF16
from xquant_jax.cache.methods.fp8 import FP8
from xquant_jax.cache.methods.int8 import Int8
from xquant_jax.cache.methods.kivi import KIVI
from xquant_jax.cache.methods.xquant import XQuant
from xquant_jax.errors import ConfigError

EIGHT = tiny_config(num_layers=8, sliding_windows=(None,) * 8)


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("bf16", BF16()),
        ("bf16,dtype=float32", BF16(dtype="float32")),
        ("int8", Int8()),
        ("int8,group=16", Int8(group=16)),
        ("fp8", FP8()),
        ("fp8,scale=token", FP8(scale="token")),
        ("kivi", KIVI(bits=4)),
        ("kivi:2,rope=post,group=32", KIVI(bits=2, group=32, rope="post")),
        ("xquant", XQuant(bits=4)),
        ("xquant:2", XQuant(bits=2)),
        ("xquant:3,basis=joint", XQuant(bits=3, key_basis="joint", value_basis="joint")),
        ("xquant:8,value_basis=joint,group=8", XQuant(bits=8, value_basis="joint", group=8)),
    ],
)
def test_spec_names_a_method_and_its_options(spec: str, method: object) -> None:
    assert CacheConfig.parse(spec) == CacheConfig(method)


@pytest.mark.parametrize(
    ("spec", "segments"),
    [
        ("xquant:2,first=3@4", [(XQuant(bits=4), 3), (XQuant(bits=2), 5)]),
        ("kivi:2,first=7@8", [(KIVI(bits=8), 7), (KIVI(bits=2), 1)]),
        ("kivi:2;0-2=4", [(KIVI(bits=4), 3), (KIVI(bits=2), 5)]),
        ("kivi:4;7=2", [(KIVI(bits=4), 7), (KIVI(bits=2), 1)]),
        ("xquant:4;5=2;0-2=8", [(XQuant(bits=8), 3), (XQuant(bits=4), 2), (XQuant(bits=2), 1), (XQuant(bits=4), 2)]),
        ("xquant,group=8,bits=4;0-1=8;2-3=8", [(XQuant(bits=8, group=8), 4), (XQuant(bits=4, group=8), 4)]),
        ("kivi:4;0-7=2", [(KIVI(bits=2), 8)]),
        ("kivi:4,first=3@4", [(KIVI(bits=4), 8)]),
    ],
)
def test_some_layers_may_have_other_bits(spec: str, segments: list[tuple[Method, int]]) -> None:
    """Runs of equal layers are one segment."""
    assert CacheConfig.parse(spec).segments(EIGHT) == segments


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("bf16", "bf16"),
        ("bf16,dtype=float32", "bf16,dtype=float32"),
        ("fp8,scale=head", "fp8"),
        ("kivi", "kivi:4"),
        ("kivi,rope=post,bits=2", "kivi:2,rope=post"),
        ("xquant:2,first=3@4,basis=joint", "xquant:2;0-2=4,basis=joint"),
        ("kivi:2,first=1@8", "kivi:2;0=8"),
        ("kivi:2;5=4,first=3@8", "kivi:2;0-2=8;5=4"),
        ("xquant-cl:2,first=2@8", "xquant-cl:2,first=2@8"),
        ("xquant-cl:2,first=3@4", "xquant-cl:2"),
        ("xquant:2,value_basis=joint,key_basis=joint", "xquant:2,basis=joint"),
        ("xquant:2,value_basis=joint", "xquant:2,value_basis=joint"),
        ("xquant,group=8,bits=4;5-5=2;0-2=8", "xquant:4;0-2=8;5=2,group=8"),
    ],
)
def test_a_cache_config_is_written_as_a_spec_that_reads_as_the_same(spec: str, canonical: str) -> None:
    config = CacheConfig.parse(spec)
    assert str(config) == canonical
    assert CacheConfig.parse(canonical) == config


def test_layers_may_be_named_in_any_order() -> None:
    config = CacheConfig(KIVI(), layer_bits=(LayerBits(5, 5, 2), LayerBits(0, 2, 8)))
    assert config == CacheConfig.parse("kivi:4;0-2=8;5=2")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("h2o", "cache method 'h2o' is not known; choose one of bf16, int8, fp8, kivi, kvquant, xquant"),
        ("xquant:5", "bits=5 is not supported; choose 2, 3, 4 or 8"),
        ("kivi:16", "bits=16 is not supported; choose 2, 3, 4 or 8"),
        ("kivi:2;0=16", "bits=16 is not supported; choose 2, 3, 4 or 8"),
        ("xquant-cl:16", "bits=16 is not supported; choose 2, 3, 4 or 8"),
        ("xquant:four", "bits=four is not a whole number"),
        ("xquant:4,basis", "option 'basis' .* has no value"),
        ("xquant:4,basis=shared", "key_basis=shared is not supported; choose joint or per_head"),
        (
            "xquant:4,rank=3",
            "xquant has no option 'rank'; it has bits, key_basis, value_basis, group, .*basis, first",
        ),
        ("xquant:", "bits= is not a whole number"),
        ("xquant:4,bits=2", "'xquant:4,bits=2' gives bits twice"),
        ("xquant:4,basis=joint,key_basis=per_head", "gives key_basis twice"),
        ("kivi:4,rope=none", "rope=none is not supported; choose pre or post"),
        ("kivi:4,group=32", "group=32 does not divide the stream's width 16"),
        ("kivi:4,group=96", "group=96 does not divide the tokens of a block, 128; these do: .1, 2, 4, 8, 16, 32, 64"),
        ("kivi:4,group=-8", "group=-8 does not divide"),
        ("fp8,scale=channel", "scale=channel is not supported; choose token or head"),
        ("fp8:8", "fp8 has no option 'bits'; it has scale"),
        ("int8:4", "int8 has no option 'bits'"),
        ("int8:8;0=4", "int8 has no option 'bits'"),
        ("int8,first=1@4", "int8 has a fixed width"),
        ("bf16,dtype=int4", "dtype=int4 is not supported"),
        ("xquant:4,group=5", "group=5 does not divide the stream's width 16; these do: .1, 2, 4, 8, 16."),
        ("xquant:2,first=3@4", "bits 0-2=4: the model has 2 layers, 0 to 1"),
        ("xquant:2,first=0@4", "first=0@4 names no layer; choose 1 or more"),
        ("xquant-cl:2,first=2", "first=2 must be LAYERS@BITS"),
        ("xquant:16", "bits=16 is not supported"),
        ("xquant:2,first=1@16", "bits=16 is not supported"),
        ("xquant:2,first=2", "first=2 must be LAYERS@BITS"),
        ("kivi:2,first=1@5", "bits=5 is not supported"),
        ("kivi:2;0=5", "bits=5 is not supported"),
        ("kivi:2;1", "bits: '1' must be LAYER=BITS or FIRST-LAST=BITS, for example 5=2 or 0-2=8"),
        ("kivi:2;-1=4", "bits: '-1=4' must be LAYER=BITS"),
        ("kivi:2;", "bits: '' must be LAYER=BITS"),
        ("kivi:2;first=4", "bits: 'first=4' must be LAYER=BITS"),
        ("kivi:2;1-0=4", "bits: '1-0=4' runs backwards; write 0-1=4"),
        ("kivi:0-1=4", "bits=0-1=4 leaves the other layers open; write bits=4;0-1=4"),
        ("kivi:2;0-1=4;1=8", "bits: 0-1=4 and 1=8 both name layer 1; name every layer once"),
        ("kivi:2;0=4;0=4", "bits: 0=4 and 0=4 both name layer 0"),
        ("kivi:2;0-2=4", "bits 0-2=4: the model has 2 layers, 0 to 1"),
        ("kivi:2;0=4,first=1@8", "bits: 0=4 and 0=8 both name layer 0; name every layer once"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_that_names_it(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig.parse(spec).segments(tiny_config())


def test_a_basis_does_not_apply_to_multi_head_models() -> None:
    with pytest.raises(ConfigError, match="basis applies to grouped-query models"):
        CacheConfig.parse("xquant:4,basis=joint").segments(tiny_config(num_kv_heads=4))


def test_other_bits_need_a_method_that_has_bits() -> None:
    with pytest.raises(ConfigError, match="bits 0=4: bf16 has a fixed width"):
        CacheConfig(BF16(), layer_bits=(LayerBits(0, 0, 4),))
