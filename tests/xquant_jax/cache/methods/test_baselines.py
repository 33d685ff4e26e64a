"""The methods that store keys and values themselves: kivi, int8, fp8, with other bits in some layers.

Prefill and decode equal an independent computation; what is stored has the promised bits and bytes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.conftest import random_model, random_tokens, tiny_config
from tests.xquant_jax.cache.methods.test_xquant import STEPS, TOLERANCE, run_library
from tests.xquant_jax.reference import Reference, bf16, directed, fake_quantize, fake_quantize_block, rms, rope
from xquant_jax.cache import layer
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.flush import flush
from xquant_jax.cache.state import Cache, allocate, cache_bytes
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.quantization import StreamSpec, dequantize, quantize

PROMPTS = (127, 130, 257)  # flushed during decode, one block, two
E4M3 = ml_dtypes.float8_e4m3fn
Quantizer = Callable[[np.ndarray], np.ndarray]
"""A block [128, C] of float32 -> what is read back of it."""


def along_token(bits: int, group: int = 16, *, clip: bool = False) -> Quantizer:
    return partial(fake_quantize_block, bits=bits, axis="token", group=group, clip=clip)


def along_channel(bits: int, group: int = 128, *, clip: bool = False) -> Quantizer:
    def quantizer(block: np.ndarray) -> np.ndarray:
        columns = [
            np.concatenate([fake_quantize(run, bits, clip) for run in column.reshape(-1, group)]) for column in block.T
        ]
        return np.stack(columns, axis=1)

    return quantizer


def e4m3_group(values: np.ndarray) -> tuple[np.ndarray, np.float32]:
    scale = max(directed(np.abs(values).max() / np.float32(448), up=True), np.float32(2.0**-126))
    return (values / scale).astype(E4M3), scale


def e4m3(group: int) -> Quantizer:
    def quantizer(block: np.ndarray) -> np.ndarray:
        rows = []
        for row in block:
            parts = [e4m3_group(part) for part in row.reshape(-1, group)]
            rows.append(np.concatenate([values.astype(np.float32) * scale for values, scale in parts]))
        return np.stack(rows)

    return quantizer


class KeysValues(Reference):
    """A cache of keys and values, after RoPE where `rotated`; `quantizers`: of the streams of every layer."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        quantizers: list[tuple[Quantizer, Quantizer]],
        rotated: bool,
        sink: int = 0,
    ) -> None:
        super().__init__(config, params, method_params={}, method=None)
        self.quantizers = [dict(zip(("key", "value"), pair, strict=True)) for pair in quantizers]
        self.rotated, self.sink = rotated, sink
        self.weights = [self.layer(i)[0] for i in range(config.num_layers)]

    def store(self, i: int, f: Any, x: np.ndarray, h: np.ndarray | None = None) -> None:
        w, stored = self.weights[i], self.stored[i]
        for side in ("key", "value"):
            vectors = stored.setdefault(side, [])
            kv = (x @ w[side]["kernel"] + w[side].get("bias", 0)).reshape(-1, self.c.head_dim)
            if side == "key" and self.apart(w):
                kv = (x @ w[side]["kernel"]).reshape(kv.shape)
            if side == "key" and self.c.qk_norm:
                kv = rms(kv, w["key_norm"]["scale"], self.c.norm_eps)
            if side == "key" and self.rotated:
                kv = rope(kv, len(vectors), self.c.rope.theta)
            vectors.append(kv.reshape(-1))

    def apart(self, w: Any) -> bool:
        """Whether keys are stored without their bias."""
        return "bias" in w["key"] and not self.rotated and not self.c.qk_norm

    def keys_values(self, w: Any, f: Any, i: int) -> tuple[np.ndarray, np.ndarray]:
        k, v = (self.read(i)[side].reshape(-1, self.c.num_kv_heads, self.c.head_dim) for side in ("key", "value"))
        if self.apart(w):
            k = k + w["key"]["bias"].reshape(k.shape[1:])
        if self.rotated:  # turned back, as the reference turns them again
            k = rope(k, -np.arange(len(k))[:, None], self.c.rope.theta)
        return k, v

    def quantize_whole_blocks(self) -> None:
        for stored, whole, quantizers in zip(self.stored, self.whole, self.quantizers, strict=True):
            for name, vectors in stored.items():
                blocks = whole.setdefault(name, [])
                for start in range(128 * len(blocks), len(vectors) - 127, 128):
                    part = np.stack(vectors[start : start + 128]).astype(bf16).astype(np.float32)
                    kept = part[: self.sink].copy()
                    if start == 0:
                        part[: self.sink] = part[self.sink]
                    read = quantizers[name](part)
                    if start == 0:
                        read[: self.sink] = kept
                    blocks.append(read)


@pytest.mark.parametrize(
    ("spec", "quantizers"),
    [
        ("kivi:2,rope=post,group=8", [(along_channel(2, 8), along_token(2, 8))] * 2),
        ("kivi:3,first=1@4", [(along_channel(4), along_token(4)), (along_channel(3), along_token(3))]),
        ("kivi:2,clip=true,sink=5", [(along_channel(2, clip=True), along_token(2, clip=True))] * 2),
        ("int8,group=8", [(along_token(8, 8), along_token(8, 8))] * 2),
        ("fp8,sink=2", [(e4m3(8), e4m3(8))] * 2),
    ],
)
def test_prefill_and_decode_equal_the_reference(spec: str, quantizers: list[tuple[Quantizer, Quantizer]]) -> None:
    normed = spec.startswith("kivi:3")  # the others store keys without their bias
    model = random_model(tiny_config(qkv_bias=True, qk_norm=normed, sliding_windows=(140, None)))
    tokens = random_tokens(model.config, len(PROMPTS), max(PROMPTS) + STEPS)
    seen = run_library(model, spec, tokens, np.asarray(PROMPTS, np.int32))
    sink = CacheConfig.parse(spec).method.sink
    for row, count in enumerate(PROMPTS):
        reference = KeysValues(model.config, model.params, quantizers, "rope=post" in spec, sink)
        pieces = [tokens[row, :count], *tokens[row, count : count + STEPS, None]]
        for step, (piece, (logits, cache)) in enumerate(zip(pieces, seen, strict=True)):
            expected = reference.feed(piece)
            assert np.abs(logits[row] - expected).max() <= TOLERANCE * np.ptp(expected), (count, step)
            start = 0
            for segment in cache.segments:
                reference.adopt(segment, row, start)
                start += segment.num_layers


@pytest.mark.parametrize("spec", ["int8", "kivi:3,rope=post,group=8"])
def test_values_rebuilt_or_absorbed_give_the_same(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of up to 16 tokens absorb values, longer ones rebuild them; here both for the same step."""
    model = random_model(tiny_config())
    tokens = random_tokens(model.config, 2, 300)
    cache_config = CacheConfig.parse(spec)
    method_params = cache_config.method_params(model.source)

    def fed(tokens: np.ndarray, cache: Cache, *counts: int) -> Any:
        apply = jax.jit(partial(model.transformer.apply, {"params": model.params}))
        return apply(tokens, cache, method_params, np.asarray(counts))

    cache = flush(fed(tokens, allocate(cache_config, model.config, batch=2, tokens=300), 270, 140)[1], method_params)
    logits = []
    for bound in (0, 16):
        monkeypatch.setattr(layer, "MOST_NEW_TOKENS", bound)
        logits.append(np.asarray(fed(tokens[:, :3], cache, 3, 3)[0]))
    assert np.abs(logits[0] - logits[1]).max() <= TOLERANCE * np.ptp(logits[0])


@pytest.mark.parametrize(
    ("spec", "bytes_per_token"),
    [
        *((f"kivi:{bits}", 2 * 128 * (bits + 0.25) / 8) for bits in (2, 3, 4, 8)),
        ("kivi:2,rope=post", 2 * 128 * (2 + 0.25) / 8),
        ("kivi:2,group=32", 2 * 128 * (2 + 1) / 8),
        ("kivi:2,first=1@4", (2 * 128 * (2 + 0.25) / 8 + 2 * 128 * (4 + 0.25) / 8) / 2),
        ("kivi:4;0=8", (2 * 128 * (4 + 0.25) / 8 + 2 * 128 * (8 + 0.25) / 8) / 2),
        ("int8", 2 * 128 * (8 + 0.25) / 8),
        ("fp8,scale=token", 2 * (128 + 2)),
        ("fp8,scale=head", 2 * (128 + 2 * 2)),
    ],
)
def test_bytes_are_exactly_those_of_the_formula(spec: str, bytes_per_token: float) -> None:
    """R = 128 in two heads; a token and layer takes 2R(b + 0.25)/8 bytes, or one per value and two per scale."""
    config = tiny_config(width=256, num_heads=8, num_kv_heads=2, head_dim=64)
    size = cache_bytes(allocate(CacheConfig.parse(spec), config, batch=3, tokens=1024))
    assert size.codes + size.scales == 3 * 1024 * config.num_layers * bytes_per_token
    assert size.window == 2 * 128 * 3 * 128 * config.num_layers * 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_of_32_tokens_along_the_channel(bits: int) -> None:
    x = np.random.default_rng(bits).standard_normal((2, 128, 6)).astype(np.float32)
    blocks = jax.jit(quantize, static_argnums=1)(jnp.asarray(x), StreamSpec(6, bits, "channel", group=32))
    assert blocks.scale.shape == blocks.zero.shape == (2, 4, 6)
    np.testing.assert_array_equal(dequantize(blocks), np.stack([along_channel(bits, 32)(block) for block in x]))


def wild_block(width: int) -> np.ndarray:
    """Values of very different sizes, up to 1e37; one group of zeros, one of tiny values, one of equal ones."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((128, width)) * 10.0 ** rng.uniform(-3, 3, (128, width))
    x *= 10.0 ** rng.uniform(-30, 33, (128, 1))
    x[0], x[1], x[2] = 0, 1e-36, -7
    return x.astype(np.float32)


@pytest.mark.parametrize("group", [4, 12])
def test_e4m3_is_exact_to_the_bit(group: int) -> None:
    x = wild_block(12)
    blocks = jax.jit(quantize, static_argnums=1)(jnp.asarray(x), StreamSpec(12, 8, group=group, format="e4m3"))
    parts = [[e4m3_group(part) for part in row.reshape(-1, group)] for row in x]
    words = np.stack([np.concatenate([values for values, _ in row]) for row in parts])
    np.testing.assert_array_equal(blocks.planes[0], words.view(np.uint8))
    np.testing.assert_array_equal(
        np.asarray(blocks.scale).astype(np.float32), [[scale for _, scale in row] for row in parts]
    )
    assert blocks.zero is None
    assert blocks.planes[0].nbytes == x.size


def test_e4m3_is_off_by_at_most_a_sixteenth_or_a_thousandth_of_the_scale() -> None:
    x = wild_block(12)
    blocks = quantize(jnp.asarray(x), StreamSpec(12, 8, group=4, format="e4m3"))
    scale = np.repeat(np.asarray(blocks.scale).astype(np.float64), 4, axis=-1)
    off = np.abs(np.asarray(dequantize(blocks)).astype(np.float64) - x)
    assert (off <= (1 + 1e-6) * np.maximum(np.abs(x) / 16, scale / 1024)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": "channel", "group": 96}, "group=96 does not divide the tokens of a block, 128"),
        ({"axis": "channel", "group": -32}, "group=-32 does not divide"),
        ({"format": "e4m3", "bits": 4}, "bits=4 is not supported for e4m3, which has 8"),
    ],
)
def test_a_stream_that_cannot_be_stored_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StreamSpec(**{"width": 128, "bits": 8, **options})
