"""XQuant computed another way: numpy, one sequence, nothing packed, nothing absorbed.

Prompt tokens see each other exactly. A stored token is read back from its quantized block once that is whole, and
from bfloat16 before; keys and values are rebuilt from it at every step.

Rounding to bfloat16 and to codes is discontinuous: two correct computations may store a neighbouring value here and
there, and at two bits one such code shows in the logits. So `adopt` compares what is stored value by value, allows few
neighbours, and goes on from what the library stored.
"""

import math
from typing import Any

import ml_dtypes
import numpy as np

from xquant_jax.config import ModelConfig

bf16 = ml_dtypes.bfloat16


def directed(value: float, up: bool) -> np.float32:
    """The neighbouring bfloat16 of a float32 value, found by looking at candidates one after the other."""
    nearest = np.asarray(value, bf16)
    if up and nearest.astype(np.float64) < value:
        nearest = np.nextafter(nearest, np.asarray(math.inf, bf16))
    if not up and nearest.astype(np.float64) > value:
        nearest = np.nextafter(nearest, np.asarray(-math.inf, bf16))
    return nearest.astype(np.float32)


def fake_quantize(group: np.ndarray, bits: int, clip: bool = False) -> np.ndarray:
    """One group, quantized and read back, value by value as docs/cache_format.md writes it."""
    group = group.astype(np.float32)
    low, high = group.min(), group.max()
    if clip:
        part = np.float32(high - low) / np.float32(4**bits)
        low, high = np.float32(low + 2 * part) + part, np.float32(high - 2 * part) - part
    zero = directed(low, up=False)
    scale = directed(np.float32(high - zero) / np.float32(2**bits - 1), up=True)
    scale = max(scale, np.float32(2.0**-126))
    codes = np.clip(np.rint((group - zero) / scale), 0, 2**bits - 1)
    return (codes * scale + zero).astype(np.float32)


def fake_quantize_levels(group: np.ndarray, levels: np.ndarray, outliers: int) -> np.ndarray:
    """One group at the nearest of `levels` between its least and largest value, all but its outliers, which stay."""
    group = group.astype(np.float32)
    far = np.argsort(-np.abs(group - np.median(group)), kind="stable")[:outliers]
    inliers = np.delete(group, far)
    zero = directed(inliers.min(), up=False)
    scale = max(directed(np.float32(inliers.max() - zero), up=True), np.float32(2.0**-126))
    unit = (group - zero) / scale
    read = (levels[np.abs(unit[:, None] - levels).argmin(axis=1)] * scale + zero).astype(np.float32)
    read[far] = group[far].astype(bf16).astype(np.float32)
    return read


def fake_quantize_block(block: np.ndarray, bits: int, axis: str, group: int, clip: bool = False) -> np.ndarray:
    """A block of 128 token vectors, in groups along the channel or along the token."""
    out = np.empty_like(block, dtype=np.float32)
    if axis == "channel":
        for c in range(block.shape[1]):
            out[:, c] = fake_quantize(block[:, c], bits, clip)
    else:
        for t in range(block.shape[0]):
            for start in range(0, block.shape[1], group):
                out[t, start : start + group] = fake_quantize(block[t, start : start + group], bits, clip)
    return out


def read_block(
    history: Any, layer: int, row: int, number: int, levels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One packed block as float32 [128, C], token by token, and the size of a code's step at every value."""
    scale = np.asarray(history.scale[layer, row, number]).astype(np.float32)
    scale = np.repeat(np.repeat(scale, 128 // len(scale), axis=0), history.spec.width // scale.shape[1], axis=1)
    if history.spec.format == "e4m3":
        values = np.asarray(history.planes[0][layer, row, number]).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return values * scale, scale * 2.0 ** (np.floor(np.log2(np.maximum(np.abs(values), 2.0**-6))) - 3)
    codes, low = 0, 0
    for words in history.planes:
        words = np.asarray(words[layer, row, number])
        p = len(words) // 4  # bits of this plane
        plane = [(words[t % (4 * p)] >> np.uint32(p * (t // (4 * p)))) & np.uint32(2**p - 1) for t in range(128)]
        codes = codes + (np.stack(plane).astype(np.int64) << low)
        low += p
    zero = np.asarray(history.zero[layer, row, number]).astype(np.float32)
    zero = np.repeat(np.repeat(zero, 128 // len(zero), axis=0), history.spec.width // zero.shape[1], axis=1)
    if levels is None:
        return (codes * scale + zero).astype(np.float32), scale
    read = (levels[codes] * scale + zero).astype(np.float32)
    places, outliers = (np.asarray(a[layer, row, number]) for a in (history.places, history.outliers))
    for at, value in np.ndenumerate(outliers):
        place = (at[0], places[at]) if history.spec.axis == "token" else (places[at], at[1])
        read[place] = value
    return read, scale * np.diff(levels).max()


def assert_neighbours(
    theirs: np.ndarray, ours: np.ndarray, step: np.ndarray | float, slack: float = 1e-5, share: float = 0.03
) -> None:
    """At most a step apart plus a neighbouring bfloat16, and all but a `share` equal (one extreme rounded otherwise
    moves its whole group a little)."""
    off = np.abs(theirs - ours) - slack * np.abs(ours).max()  # less what float32 sums are off by
    assert (off <= 1.02 * step + np.abs(ours) / 128).all()
    assert (off > 0).sum() <= max(share * off.size, 3)


def rotated(x: np.ndarray) -> np.ndarray:
    """Vectors as wide as a power of two times Sylvester's Hadamard matrix, entry by entry: -1 to the number of ones
    that two indices share."""
    index = np.arange(x.shape[-1])
    signs = np.vectorize(lambda both: (-1) ** int(both).bit_count())(index[:, None] & index)
    return x @ signs / math.sqrt(len(index))


def rms(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rope(x: np.ndarray, positions: np.ndarray | int, theta: float) -> np.ndarray:
    """Rotates the pairs of vectors [..., d] as complex numbers; `positions` are broadcast over the vectors."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * np.multiply.outer(positions, theta ** (-np.arange(half) / half)))
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], axis=-1)


class Reference:
    """A model and what its xquant cache stores: per layer and stream all vectors, and those read back from blocks."""

    def __init__(self, config: ModelConfig, params: Any, method_params: Any, method: Any) -> None:
        self.c, self.params, self.method_params, self.method = config, params, method_params, method
        self.stored: list[dict[str, list[np.ndarray]]] = [{} for _ in range(config.num_layers)]
        self.whole: list[dict[str, list[np.ndarray]]] = [{} for _ in range(config.num_layers)]
        self.length = 0

    def layer(self, i: int) -> Any:
        """Parameters and factors of one layer, float64."""

        def pick(tree: Any) -> Any:
            return {k: pick(v) if isinstance(v, dict) else np.asarray(v[i], np.float64) for k, v in tree.items()}

        return pick(self.params["layers"]), pick(self.method_params)

    def read(self, i: int) -> dict[str, np.ndarray]:
        """Every stored token's vectors as they are read back, [S, C]."""
        read = {}
        for name, vectors in self.stored[i].items():
            old = self.whole[i].get(name, [])
            fresh = [np.asarray(v, bf16).astype(np.float64)[None] for v in vectors[128 * len(old) :]]
            read[name] = np.concatenate([*old, *fresh])
        return read

    def keys_values(self, w: Any, f: Any, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys before RoPE and values of every stored token, [S, K, d]."""
        read, both = self.read(i), []
        for side in ("key", "value"):
            z = read["x"] if "x" in read else read[side]
            up = f[side]["rebuild"] * f[side].get("scale", 1.0)
            if up.ndim == 3:
                heads = np.split(z, self.c.num_kv_heads, axis=1)
                kv = np.stack([h @ up[n] for n, h in enumerate(heads)], axis=1)
            else:
                kv = (z @ up).reshape(len(z), self.c.num_kv_heads, self.c.head_dim)
            if "bias" in w[side]:
                kv = kv + w[side]["bias"].reshape(self.c.num_kv_heads, self.c.head_dim)
            if side == "key" and self.c.qk_norm:
                kv = rms(kv, w["key_norm"]["scale"], self.c.norm_eps)
            both.append(kv)
        return both[0], both[1]

    def store(self, i: int, f: Any, x: np.ndarray, h: np.ndarray | None = None) -> None:
        if "project" in f["key"]:
            vectors = {s: x @ f[s]["project"].reshape(len(x), -1) for s in ("key", "value")}
        else:
            vectors = {"x": rotated(x) if self.method.rotate is not False else x}
        for name, vector in vectors.items():
            self.stored[i].setdefault(name, []).append(vector)

    def quantize_whole_blocks(self) -> None:
        for stored, whole in zip(self.stored, self.whole, strict=True):
            for name, vectors in stored.items():
                blocks = whole.setdefault(name, [])
                while 128 * (len(blocks) + 1) <= len(vectors):
                    exact = np.stack(vectors[128 * len(blocks) : 128 * (len(blocks) + 1)])
                    exact = exact.astype(bf16).astype(np.float32)
                    read = self.quantized(self.without_sink(exact, len(blocks)), name, self.method)
                    if not blocks:
                        read[: self.method.sink] = exact[: self.method.sink]
                    blocks.append(read)

    def without_sink(self, block: np.ndarray, number: int) -> np.ndarray:
        """A block as it is quantized: the first tokens of a sequence, which are kept, are as the one behind them."""
        n = 0 if number else self.method.sink
        return np.concatenate([np.repeat(block[n : n + 1], n, axis=0), block[n:]])

    def quantized(self, block: np.ndarray, name: str, method: Any) -> np.ndarray:
        group = max(g for g in range(1, 129) if block.shape[1] % g == 0)
        axis = "channel" if name == "key" else "token"
        clip = method.rotates(self.c) if method.clip is None else method.clip
        return fake_quantize_block(block, method.bits, axis, group, clip and method.bits < 8)

    def levels(self, i: int, name: str) -> np.ndarray | None:
        """Those of a stream that has a codebook."""
        return None

    def adopt(self, segment: Any, row: int, start: int = 0) -> None:
        """Checks the library's stored streams of one sequence against these, then takes them over; the segment's
        layers are those from `start`."""
        for i in range(start, start + segment.num_layers):
            for name, history in segment.history.items():
                blocks, vectors = self.whole[i][name], self.stored[i][name]
                for n, block in enumerate(blocks):
                    theirs, step = read_block(history, i - start, row, n, self.levels(i, name))
                    if n == 0 and segment.sink:
                        kept = np.asarray(segment.sink[name][i - start, row]).astype(np.float32)
                        theirs[: len(kept)] = kept
                    assert_neighbours(theirs, block, step)
                    blocks[n] = theirs
                first = 128 * len(blocks)
                if first < len(vectors):
                    theirs = np.asarray(segment.window[name][i - start, row, : len(vectors) - first]).astype(np.float32)
                    assert_neighbours(theirs, np.asarray(vectors[first:]).astype(bf16).astype(np.float32), 0.0)
                    vectors[first:] = list(theirs)

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        """Appends tokens that see each other exactly; returns the logits of the last."""
        c, at = self.c, self.length + np.arange(len(tokens))
        h = np.asarray(self.params["embed"]["embedding"], np.float64)[tokens]
        for i in range(c.num_layers):
            w, f = self.layer(i)
            x = rms(h, w["attention_norm"]["scale"], c.norm_eps)
            q, k, v = (
                (x @ w[p]["kernel"] + w[p].get("bias", 0)).reshape(len(x), -1, c.head_dim)
                for p in ("query", "key", "value")
            )
            if c.qk_norm:
                q, k = (
                    rms(q, w["query_norm"]["scale"], c.norm_eps),
                    rms(k, w["key_norm"]["scale"], c.norm_eps),
                )
            if self.length:
                k, v = map(np.concatenate, zip(self.keys_values(w, f, i), (k, v), strict=True))
            q, k = rope(q, at[:, None], c.rope.theta), rope(k, np.arange(len(k))[:, None], c.rope.theta)
            distance = at[:, None] - np.arange(len(k))
            seen = (distance >= 0) & (distance < (c.sliding_windows[i] or len(k)))
            out = np.empty(q.shape)
            for head in range(c.num_heads):
                kv = head // (c.num_heads // c.num_kv_heads)
                scores = np.where(seen, q[:, head] @ k[:, kv].T / math.sqrt(c.head_dim), -np.inf)
                p = np.exp(scores - scores.max(-1, keepdims=True))
                out[:, head] = p @ v[:, kv] / p.sum(-1, keepdims=True)
            for token in range(len(x)):
                self.store(i, f, x[token], h[token])
            h = h + out.reshape(len(x), -1) @ w["output"]["kernel"] + w["output"].get("bias", 0)
            y = rms(h, w["mlp_norm"]["scale"], c.norm_eps)
            gate = y @ w["gate"]["kernel"]
            h = h + (gate / (1 + np.exp(-gate)) * (y @ w["up"]["kernel"])) @ w["down"]["kernel"]
        self.length += len(tokens)
        self.quantize_whole_blocks()
        last = rms(h[-1], np.asarray(self.params["final_norm"]["scale"], np.float64), c.norm_eps)
        if c.tied_embeddings:
            return last @ np.asarray(self.params["embed"]["embedding"], np.float64).T
        return last @ np.asarray(self.params["head"]["kernel"], np.float64)
