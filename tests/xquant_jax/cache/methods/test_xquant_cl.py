"""XQuant-CL in prefill and decode equals an independent computation: numpy, one sequence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import xla as tiles
from tests.conftest import random_model, random_tokens, tiny_config
from tests.xquant_jax.cache.methods.test_xquant import STEPS, run_library
from tests.xquant_jax.reference import Reference, assert_neighbours, bf16, fake_quantize_block, read_block, rms, rotated
from xquant_jax.cache.append import append
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.flush import flush
from xquant_jax.cache.layer import LayerCache, attend_own
from xquant_jax.cache.state import allocate, cache_bytes
from xquant_jax.cache.store import store_and_read, without_sink
from xquant_jax.errors import ConfigError
from xquant_jax.numerics import attention
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.quantization import allocate_blocks

PROMPTS = (127, 250, 390)  # flushed during decode, one block, three
TOLERANCE = 4e-4  # of the logits' range: float32 against float64, over four layers
SLACK = 1e-4  # of the largest value: what float32 sums are off by after four layers
MODELS = {
    "K=H": tiny_config(num_layers=4, num_kv_heads=4, sliding_windows=(None,) * 4, tied_embeddings=True),
    "K<H": tiny_config(num_layers=4, sliding_windows=(None, None, 200, None), qkv_bias=True, qk_norm=True),
}


class ClosedLoop(Reference):
    """Layer 0 plain xquant, layer 1 the base, above it differences. `whole` holds x^ of the history, `codes` the
    streams as they are read back."""

    def __init__(self, model: Any, cache_config: CacheConfig) -> None:
        self.segments = cache_config.segments(model.config)
        self.segment_of = [n for n, (_, layers) in enumerate(self.segments) for _ in range(layers)]
        super().__init__(model.config, model.params, cache_config.method_params(model.source), cache_config.method)
        self.codes: list[dict[str, list[np.ndarray]]] = [{} for _ in range(model.config.num_layers)]
        self.adopted: list[set[int]] = [set() for _ in range(model.config.num_layers)]

    def layer(self, i: int) -> Any:
        def pick(tree: Any) -> Any:
            return {k: pick(v) if isinstance(v, dict) else np.asarray(v[i], np.float64) for k, v in tree.items()}

        method_params = dict(self.method_params[self.segment_of[i]])
        matrices = method_params.pop("predict", ())
        picked = pick(method_params)
        if len(matrices) == 2:
            picked |= {"down": np.asarray(matrices[0][i], np.float64), "up": np.asarray(matrices[1][i], np.float64)}
        elif len(matrices) == 1 and i > 0:
            below, own = (np.asarray(method_params["basis"][n], np.float64) for n in (i - 1, i))
            weakest = 0.1 if self.method.basis == "per_head" else 1e-9
            picked["predict"] = np.linalg.pinv(below, weakest) @ own
            if (
                self.method.predict is None and self.method.basis is None
            ):  # learned: test_calibration has its definition
                picked["predict"] = np.asarray(matrices[0][i], np.float64)
        return pick(self.params["layers"]), picked

    def read(self, i: int) -> dict[str, np.ndarray]:
        read = super().read(i)
        if i > 0 and self.method.sink and self.whole[i].get("x"):
            kept = np.asarray(self.stored[i]["x"][: self.method.sink], bf16).astype(np.float64)
            read["x"] = np.concatenate([kept, read["x"][self.method.sink :]])
        if i > 0 and self.method.basis == "per_head":
            return dict(zip(("key", "value"), np.split(read["x"], 2, axis=1), strict=True))
        return read

    def keys_values(self, w: Any, f: Any, i: int) -> tuple[np.ndarray, np.ndarray]:
        if i == 0 or self.method.input != "residual":
            return super().keys_values(w, f, i)
        vectors = rms(self.read(i)["x"], 1.0, self.c.norm_eps)
        heads = (len(vectors), self.c.num_kv_heads, self.c.head_dim)
        return (vectors @ f["key"]["rebuild"]).reshape(heads), (vectors @ f["value"]["rebuild"]).reshape(heads)

    def store(self, i: int, f: Any, x: np.ndarray, h: np.ndarray | None = None) -> None:
        if i == 0:
            if self.method.input != "post_norm":
                x = rms(h, 1.0, self.c.norm_eps)
            return super().store(i, f, x)
        if self.method.input == "unit_norm":
            x = rms(h, 1.0, self.c.norm_eps)
        if self.method.input == "residual":
            x = h
        if self.latent(f):
            x = x @ f["basis"]
        elif self.method.rotate and "basis" not in f:
            x = rotated(x)
        self.stored[i].setdefault("x", []).append(x)

    def latent(self, f: Any) -> bool:
        return "basis" in f and self.method.predict != "paper"

    def predicted(self, f: Any, total: np.ndarray) -> np.ndarray:
        """M of the definition, computed here: A_below^+ A, on the directions that calibration found."""
        if not self.latent(f):
            return total
        return total @ f["down"] @ f["up"] if self.method.rank else total @ f["predict"]

    def quantize_whole_blocks(self) -> None:
        for name, vectors in self.stored[0].items():
            blocks = self.whole[0].setdefault(name, [])
            while 128 * (len(blocks) + 1) <= len(vectors):
                exact = np.stack(vectors[128 * len(blocks) : 128 * (len(blocks) + 1)]).astype(bf16).astype(np.float32)
                read = self.quantized(self.without_sink(exact, len(blocks)), name, self.segments[0][0])
                if not blocks:
                    read[: self.method.sink] = exact[: self.method.sink]
                blocks.append(read)
        for n in range(len(self.whole[1].get("x", [])), len(self.stored[1]["x"]) // 128):
            total = None
            for i in range(1, self.c.num_layers):
                total = self.add_layer(i, n, total, None)

    def add_layer(self, i: int, n: int, total: np.ndarray | None, theirs: np.ndarray | None) -> np.ndarray:
        """Quantizes block n of layer i (or takes `theirs` as what was read back) and returns x^ with it."""
        _, f = self.layer(i)
        basis = None if self.latent(f) else f.get("basis")
        below = None if total is None else self.predicted(f, total)
        if theirs is None:
            part = np.stack(self.stored[i]["x"][128 * n : 128 * (n + 1)]).astype(bf16).astype(np.float64)
            part = self.without_sink(part, n)
            part = part if below is None else part - below
            part = part if basis is None else part @ basis
            theirs = self.quantized(part.astype(np.float32), "x", self.segments[self.segment_of[i]][0])
        self.codes[i].setdefault("x", [])[n : n + 1] = [theirs]
        lifted = theirs if basis is None else theirs @ basis.T
        total = self.round((lifted if below is None else below + lifted).astype(np.float32))
        self.whole[i].setdefault("x", [])[n : n + 1] = [total]
        return total

    def round(self, total: np.ndarray) -> np.ndarray:
        if self.method.accumulator == "bf16":
            return total.astype(bf16).astype(np.float64)
        return fake_quantize_block(total, 8, "token", total.shape[1]).astype(np.float64)

    def adopt_all(self, cache: Any, row: int) -> None:
        """`Reference.adopt` for streams that are differences: what was stored, then the sums that follow from it."""
        totals: dict[int, np.ndarray] = {}
        for i in range(self.c.num_layers):
            segment = cache.segments[self.segment_of[i]]
            at = i - self.segment_of.index(self.segment_of[i])
            whole = len(next(iter(self.whole[i].values()))) if self.whole[i] else 0
            for name, history in segment.history.items():
                for n in range(whole):
                    theirs, step = read_block(history, at, row, n)
                    if i > 0 and n not in self.adopted[i]:  # what this layer stores on top of the library's sum below
                        self.add_layer(i, n, totals.get(n), None)
                        assert_neighbours(theirs, self.codes[i]["x"][n], step, SLACK, 0.1)
                        self.adopted[i].add(n)
                    if i > 0:
                        totals[n] = self.add_layer(i, n, totals.get(n), theirs)
                    else:
                        if n == 0 and segment.sink:
                            theirs[: self.method.sink] = np.asarray(segment.sink[name][at, row]).astype(np.float32)
                        assert_neighbours(theirs, self.whole[i][name][n], step, SLACK, 0.1)
                        self.whole[i][name][n] = theirs
            for name, sink in segment.sink.items() if whole else ():
                ours, theirs = self.stored[i][name], np.asarray(sink[at, row]).astype(np.float32)
                assert_neighbours(
                    theirs, np.asarray(ours[: len(theirs)]).astype(bf16).astype(np.float32), 0.0, SLACK, 0.1
                )
                ours[: len(theirs)] = list(theirs)
            for name, window in segment.window.items():
                vectors = self.stored[i][name]
                theirs = np.asarray(window[at, row, : len(vectors) - 128 * whole]).astype(np.float32)
                if len(theirs):
                    assert_neighbours(
                        theirs, np.asarray(vectors[128 * whole :]).astype(bf16).astype(np.float32), 0.0, SLACK, 0.1
                    )
                    vectors[128 * whole :] = list(theirs)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("K=H", "xquant-cl:4,rebuild_dtype=int8,rotate=false,clip=false,sink=0"),
        ("K=H", "xquant-cl:2,input=residual,accumulator=bf16"),
        ("K<H", "xquant-cl:2,predict=paper,input=post_norm,accumulator=bf16"),
        ("K<H", "xquant-cl:3,accumulator=bf16"),
        ("K<H", "xquant-cl:2,predict=latent,basis=per_head,accumulator=bf16"),
        ("K<H", "xquant-cl:3,predict=latent,rank=8,input=post_norm,rotate=false,clip=false,sink=0"),
    ],
)
def test_prefill_and_decode_equal_the_reference(kind: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged rows around flushes; the base is the second layer, so that differences build on differences. Three blocks
    in tiles of two: the last tile begins within the one before, and every difference is added once."""
    monkeypatch.setattr(tiles, "TILE_BLOCKS", 2)
    model = random_model(MODELS[kind])
    cache_config = CacheConfig.parse(f"{spec},first=2@4")
    counts = np.asarray(PROMPTS, np.int32)
    tokens = random_tokens(model.config, len(PROMPTS), max(PROMPTS) + STEPS)
    seen = run_library(model, str(cache_config), tokens, counts)
    for row, count in enumerate(PROMPTS):
        reference = ClosedLoop(model, cache_config)
        pieces = [tokens[row, :count], *tokens[row, count : count + STEPS, None]]
        for step, (piece, (logits, cache)) in enumerate(zip(pieces, seen, strict=True)):
            expected = reference.feed(piece)
            assert np.abs(logits[row] - expected).max() <= TOLERANCE * np.ptp(expected), (row, step)
            reference.adopt_all(cache, row)


def test_the_running_sum_is_counted_as_scratch() -> None:
    config = MODELS["K=H"]
    sizes = {
        spec: cache_bytes(jax.eval_shape(lambda s=spec: allocate(CacheConfig.parse(s), config, batch=2, tokens=1024)))
        for spec in ("xquant:2,first=3@4", "xquant-cl:2,accumulator=bf16", "xquant-cl:2")
    }
    plain, wide, narrow = sizes.values()
    assert wide.codes + wide.scales == plain.codes + plain.scales
    assert wide.scratch - plain.scratch == 2 * 1024 * config.width * 2
    assert narrow.scratch - plain.scratch == 2 * 1024 * (config.width + 4)  # scale and zero of one group of 32


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("K<H", "xquant-cl:2,input=residual", "input=residual applies to models with a key/value head per query head"),
        ("K=H", "xquant-cl:2,predict=latent", "predict=latent applies to grouped-query models"),
        ("K=H", "xquant-cl:2,first=4@4", "first=4@4: the model has 4 layers"),
        ("K=H", "xquant-cl:2,input=pre_norm", "input=pre_norm is not supported; choose post_norm or unit_norm or"),
        ("K=H", "xquant-cl:5", "bits=5 is not supported"),
        ("K<H", "xquant-cl:2,predict=paper,rank=8", "rank=8 applies to predict=latent; leave one of them out"),
        ("K=H", "xquant-cl:2,rank=8", "rank=8 applies to grouped-query models"),
        ("K<H", "xquant-cl:2,predict=paper,basis=per_head", "basis=per_head applies to predict=latent"),
        ("K<H", "xquant-cl:2,predict=latent,rank=33", "rank=33: the latent has 32 directions"),
        ("K<H", "xquant-cl:2,predict=latent,rank=-1", "rank=-1 is not possible"),
        ("K=H", "xquant-cl:2,rebuild_dtype=fp8", "fp8 takes codes of up to 4 bits, a running sum has 8; choose int8"),
        ("K=H", "xquant-cl:2,rebuild_dtype=int4", "rebuild_dtype=int4 is not supported; choose bf16 or int8"),
        (
            "K=H",
            "xquant-cl:2,rebuild_dtype=int8,accumulator=bf16",
            "accumulator=bf16 does not; choose accumulator=int8",
        ),
        ("K=H", "xquant-cl:2,rebuild_dtype=int8,input=residual", "input=residual does not; choose input=unit_norm"),
        ("K<H", "xquant-cl:2,rebuild_dtype=int8,basis=per_head", "basis=per_head does not; choose basis=joint"),
    ],
)
def test_what_does_not_apply_is_an_error(kind: str, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig.parse(spec).segments(MODELS[kind])


@pytest.mark.parametrize("spec", ["xquant-cl:3,predict=paper", "xquant-cl:2,basis=per_head,rank=16"])
def test_decode_reads_the_history_that_protocol_paper_stores(spec: str) -> None:
    """The same vectors through windows, two flushes and the tile loop, and through `store_and_read` at once: attention
    to them is the same in every layer. Ragged rows, one shorter than a block."""
    model = random_model(MODELS["K<H"])
    c, cache_config = model.config, CacheConfig.parse(f"{spec},first=2@4")
    method_params = cache_config.method_params(model.source)
    counts = np.asarray([400, 256, 90])
    rng = np.random.default_rng(0)
    cache = allocate(cache_config, c, batch=3, tokens=400, max_step=200)
    vectors = [
        {
            n: rng.standard_normal((s.num_layers, 3, 400, w.shape[3])).astype(bf16).astype(np.float32)
            for n, w in s.window.items()
        }
        for s in cache.segments
    ]
    for start in (0, 200):
        piece = tuple({n: jnp.asarray(v[:, :, start : start + 200]) for n, v in part.items()} for part in vectors)
        cache = flush(append(cache, piece, jnp.asarray(np.clip(counts - start, 0, 200))), method_params)
    q = jnp.asarray(rng.standard_normal((3, 1, c.num_heads, c.head_dim)), jnp.float32)
    frequencies = jnp.asarray(c.rope.frequencies(c.head_dim))
    geometry = Geometry(jnp.asarray(counts)[:, None], 2**30, frequencies, c.head_dim**-0.5)
    running_sum, sums, start = cache.running_sum, [None] * 3, 0
    for segment, part, own_factors in zip(cache.segments, vectors, method_params, strict=True):
        method, specs = segment.method, segment.method.streams(c)
        for i in range(segment.num_layers):
            own = jax.tree.map(lambda a, i=i, start=start: a[start + i], own_factors)
            counts_of = cache.origins, cache.history_blocks, cache.window_lengths
            stored = LayerCache(segment, jnp.int32(i), *counts_of, running_sum)
            got, running_sum = attend_own(own, q, stored, geometry, c)
            for row, count in enumerate(counts.tolist()):
                whole = count // 128 * 128
                window = {n: jnp.asarray(v[i, row : row + 1, :count]) for n, v in part.items()}
                read = window
                if whole:
                    if sums[row] is None and (spec_of := method.running_sum(c)) is not None:
                        sums[row] = allocate_blocks(spec_of, (1, whole // 128))
                    blocks = {n: v[:, :whole] for n, v in window.items()}
                    blocks = without_sink(method, blocks, jnp.ones(1, bool))
                    _, old, sums[row] = store_and_read(method, own, blocks, sums[row], specs)
                    kept = method.sink
                    read = {
                        n: jnp.concatenate([w[:, :kept], old[n][:, kept:].astype(w.dtype), w[:, whole:]], axis=1)
                        for n, w in window.items()
                    }
                k, v = method.rebuild(own, read, c)
                at = dataclasses.replace(geometry, positions=geometry.positions[row : row + 1])
                expected = attention.attend(q[row : row + 1], k, v, at, origin=jnp.zeros(1, jnp.int32))
                np.testing.assert_allclose(got.out[row], expected.out[0], atol=2e-4 * float(np.abs(expected.out).max()))
                np.testing.assert_allclose(got.lse[row], expected.lse[0], atol=1e-3)
        start += segment.num_layers
