"""The operations: every backend against the same computed plainly, in float64, from what is stored.

Kernels run on their interpreters. They multiply in bfloat16, so queries and matrices are numbers that bfloat16 can
hold, and what is left is rounded keys and probabilities: 2^-8 of a few products.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Accumulate, Accumulation, DecodeAttention, KeyRebuild, Quantize, RematProject, api, target
from pallas_kernels.eight_bits import quantize_matrix
from pallas_kernels.pallas_tpu import decode_attention_tiling
from tests.compiled import dequantized, quantized, unpacked
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.quantization import Blocks, StreamSpec
from xquant_jax.numerics.rope import Rope

NO_WINDOW = 2**30
TOLERANCE = {"xla": 2e-4}
KERNEL_TOLERANCE = 1e-2

# what a test is run with: a backend and a kind of device; pallas_gpu takes few of these calls, and has tests of its own
BACKENDS = ["xla", *(name for name in api.BACKENDS if name != "pallas_gpu")]
RUNS = {name: (name, None) for name in BACKENDS}
KINDS = {"v5p": "TPU v5p", "v6e": "TPU v6 lite", "v7x": "TPU7x"}
RUNS |= {f"pallas_tpu-{chip}": ("pallas_tpu", kind) for chip, kind in KINDS.items()}


run = jax.jit(pallas_kernels.run, static_argnames="implementation")


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A history of a few blocks has several tiles on a TPU."""
    monkeypatch.setattr(decode_attention_tiling, "LONGEST_TILE", 8)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend that is not installed is skipped; one that is, and cannot be imported, fails."""
    name, kind = RUNS[request.param]
    if name != "xla" and (reason := api.not_installed(name)):
        pytest.skip(f"{name} {reason}")
    with target.interpreted(), target.compiling_for("tpu" if kind else "cpu", kind):
        api.check(name)
        yield name


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `decode_attention`; sizes of real models, scaled down."""

    form: str  # of the key rebuild
    key_bits: int
    value_bits: int
    new: int = 1
    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    axis: str = "channel"  # of the key stream
    width: int = 0  # of the key stream; 0: all heads
    one_stream: bool = False
    small: str = ""  # type of a key rebuild matrix in 8 bits
    bias: bool = False
    norm: bool = False
    rotated: bool = False
    sliding_window: int = NO_WINDOW
    skip: int | tuple[int, ...] = 0  # of all sequences, or of each
    absent: bool = False  # queries whose position is -1
    history_blocks: tuple[int, ...] = (0, 1, 2, 5)
    blocks: int = 5


CASES = [
    Case("per_head", 2, 3, new=3, sliding_window=300, skip=(0, 4, 4, 370), norm=True, bias=True, absent=True),
    Case("per_head", 8, 8, new=16, heads=12, history_blocks=(0, 2)),  # more queries than a Triton program takes
    Case("per_head", 3, 4, skip=(7, 1100, 1200), history_blocks=(1, 18, 9), blocks=18),  # whole tiles, a whole sequence
    Case("dense", 3, 8, new=2, bias=True, absent=True),
    Case("dense", 4, 2, skip=128, kv_heads=4, axis="token", width=256, one_stream=True),
    Case("dense", 3, 3, kv_heads=4, axis="token", width=256, one_stream=True, small="int8", bias=True, norm=True),
    Case(
        "dense",
        8,
        8,
        dim=128,
        new=2,
        axis="token",
        width=512,
        one_stream=True,
        small="int8",
        sliding_window=200,
        skip=(3, 0, 150, 450),
        absent=True,
    ),
    Case("dense", 4, 4, dim=128, new=2, axis="token", width=256, one_stream=True, small="fp8", skip=(3, 3, 0, 200)),
    Case("identity", 4, 8, skip=(5, 0, 5, 300), rotated=True),
    Case("identity", 8, 4, axis="token", skip=-128, history_blocks=(1, 2)),  # as on a device that holds later blocks
    Case(
        "identity", 2, 2, sliding_window=200, history_blocks=(17, 16), blocks=18
    ),  # around the end of the largest tile
]
"""What `test_model_shapes.py` does not try: windows, skips, biases, norms, several new tokens, long histories, queries
that see nothing beside others that do."""


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers that bfloat16 can hold."""
    numbers = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return numbers.astype(jnp.bfloat16).astype(np.float32)


def plain_attention(
    q, keys, values, history_blocks, positions, sliding_window, skip, frequencies
) -> tuple[np.ndarray, np.ndarray]:
    """One query head at a time, float64, complex rotations; keys [B, S, K, d], values [B, S, K or 1, C]."""
    batch, length, heads, dim = q.shape
    kv_heads = keys.shape[2]
    out = np.zeros((batch, length, heads, values.shape[-1]))
    lse = np.full((batch, length, heads), -np.inf)

    def turn(x: np.ndarray, position: np.ndarray | int) -> np.ndarray:
        if frequencies is None:
            return x
        z = x[..., : dim // 2] + 1j * x[..., dim // 2 :]
        z = z * np.exp(1j * np.multiply.outer(position, frequencies.astype(np.float64)))
        return np.concatenate([z.real, z.imag], axis=-1)

    for b, t, h in np.ndindex(batch, length, heads):
        s = np.arange(max(skip[b], 0), 128 * history_blocks[b])
        s = s[(s <= positions[b, t]) & (positions[b, t] - s < sliding_window)]
        if not len(s):
            continue
        kv = h // (heads // kv_heads)
        score = turn(keys[b, s, kv], s) @ turn(q[b, t, h], positions[b, t]) / math.sqrt(dim)
        lse[b, t, h] = np.log(np.exp(score - score.max()).sum()) + score.max()
        out[b, t, h] = np.exp(score - lse[b, t, h]) @ values[b, s, kv if values.shape[2] > 1 else 0]
    return out, lse


LOOPED = [
    Case("dense", 2, 2, 1, 16, 16, axis="token", width=1152, one_stream=True, blocks=16, history_blocks=(7, 11)),
    Case("dense", 8, 8, axis="token", width=256, one_stream=True, small="int8", blocks=16, history_blocks=(7, 11)),
    Case("dense", 2, 2, axis="token", width=256, one_stream=True, small="fp8", blocks=16, history_blocks=(7, 11)),
]
"""So many multiplications that groups are a loop on a TPU, or 8 bits: chunks of eight blocks, then of two."""

ON_A_V6E = [*(case for case in CASES if case.norm or case.bias or case.rotated), *LOOPED[1:]]
"""A v6e multiplies wider matrices, and calculates in bfloat16: every form once, with all that is calculated in it."""


def differs(run: str, case: Case) -> bool:
    """Whether a run tries what no other one does: a v5p cuts an odd number of sequences in two, a v7x takes fp8."""
    if run == "pallas_tpu-v7x" or (case.small == "fp8" and run.startswith("pallas_tpu")):
        return run == "pallas_tpu-v7x" and case.small == "fp8"
    return (run != "pallas_tpu-v5p" or len(case.history_blocks) % 2 == 1) and (
        run != "pallas_tpu-v6e" or case in ON_A_V6E
    )


RUN_CASES = [
    pytest.param(
        run,
        case,
        id=f"{run}-{case.small or case.form}-{case.key_bits}-{case.value_bits}-{case.new}-{case.kv_heads}"
        + ("-skip" if case.skip else ""),
    )
    for run in sorted(RUNS)
    for case in (*CASES, *(LOOPED if run.startswith("pallas_tpu") else []))
    if differs(run, case)
]


@pytest.mark.parametrize(("implementation", "case"), RUN_CASES, indirect=["implementation"])
def test_decode_attention(implementation: str, case: Case) -> None:
    layers, batch, kv_heads, dim = 2, len(case.history_blocks), case.kv_heads, case.dim
    width, history_blocks = case.width or kv_heads * dim, np.asarray(case.history_blocks, np.int32)
    matrix = {
        "per_head": lambda: random(kv_heads, dim, dim) / 16,
        "dense": lambda: random(width, kv_heads * dim) / 32,
        "identity": lambda: None,
    }[case.form]()
    small = {}
    if case.small:
        small = {name: a[0] for name, a in quantize_matrix(jnp.asarray(matrix)[None], case.small, 128).items()}
        matrix = np.asarray(small["matrix"], np.float64) * np.asarray(small["scale"])
    rebuild = KeyRebuild(
        matrix=small.pop("matrix") if small else None if matrix is None else jnp.asarray(matrix),
        bias=jnp.asarray(random(kv_heads * dim, seed=3)) if case.bias else None,
        norm=jnp.asarray(1 + random(dim, seed=4) / 4) if case.norm else None,
        norm_eps=1e-5,
        **small,
    )

    def stream(bits: int, axis, seed: int) -> Blocks:
        x = random(layers, batch, case.blocks, 128, width, seed=seed)
        return quantized(jnp.asarray(x), StreamSpec(width, bits, axis))

    key = stream(case.key_bits, case.axis, seed=1)
    value = None if case.one_stream else stream(case.value_bits, "token", seed=2)
    value_heads = 1 if case.form == "dense" else kv_heads
    q = random(batch, case.new, case.heads, dim)
    frequencies = Rope().frequencies(dim)
    positions = 128 * history_blocks[:, None] + 40 + np.arange(case.new)
    if case.absent:  # all queries of a sequence, all but one of another
        positions[1] = positions[-1, 1:] = -1
    skip = np.broadcast_to(np.asarray(case.skip, np.int32), batch)

    call = DecodeAttention(
        jnp.asarray(q),
        key,
        rebuild,
        value,
        jnp.asarray(history_blocks),
        Geometry(jnp.asarray(positions), case.sliding_window, jnp.asarray(frequencies), dim**-0.5, case.rotated),
        jnp.int32(1),  # traced, as in the scan over layers
        num_kv_heads=kv_heads,
        value_heads=value_heads,
        skip=jnp.asarray(skip),
    )
    part = run(call, implementation)
    z = np.asarray(dequantized(key))[1].reshape(batch, -1, width).astype(np.float64)
    if case.form == "per_head":
        keys = np.einsum("bske,ked->bskd", z.reshape(batch, -1, kv_heads, dim), matrix)
    else:
        keys = z if matrix is None else z @ matrix
        keys = keys.reshape(batch, -1, kv_heads, dim)
    if case.bias:
        keys = keys + np.asarray(rebuild.bias).reshape(kv_heads, dim)
    if case.norm:
        keys = keys / np.sqrt((keys**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(rebuild.norm)
    values = (
        np.asarray(dequantized(call.values))[1].reshape(batch, case.blocks * 128, value_heads, -1).astype(np.float64)
    )
    out, lse = plain_attention(
        q,
        keys,
        values,
        history_blocks,
        positions,
        case.sliding_window,
        skip,
        None if case.rotated else frequencies,
    )
    tolerance = TOLERANCE.get(implementation, KERNEL_TOLERANCE)
    np.testing.assert_allclose(part.lse, lse, atol=tolerance)
    np.testing.assert_allclose(part.out, out, atol=tolerance)


@pytest.mark.parametrize("implementation", BACKENDS, indirect=True)
@pytest.mark.parametrize(("bits", "axis"), [(2, "token"), (3, "channel"), (4, "token"), (8, "channel")])
def test_remat_project(implementation: str, bits: int, axis) -> None:
    batch, width, columns = 2, 256, 192
    blocks = quantized(random(batch, 3, 128, width), StreamSpec(width, bits, axis))
    weight = random(width, columns) / 16
    got = run(RematProject(blocks, jnp.asarray(weight)), implementation)
    expected = np.asarray(dequantized(blocks)).reshape(batch, 3 * 128, width).astype(np.float64) @ weight
    np.testing.assert_allclose(got, expected, atol=TOLERANCE.get(implementation, KERNEL_TOLERANCE))


@dataclasses.dataclass(frozen=True)
class Sum:
    """One call of `accumulate`. predict: widths of what the sum below becomes, one matrix after the other."""

    bits: int
    axis: str = "token"
    width: int = 256  # of the sum
    stored: int = 256  # width of the stream
    predict: tuple[int, ...] | None = ()
    lift: bool = False
    history_blocks: tuple[int, ...] = (0, 4)
    blocks: int = 4


SUMS = [
    Sum(2, predict=(256,)),
    Sum(3, axis="channel", predict=(128, 256)),
    Sum(2, width=384, stored=384),
    Sum(4, width=384, stored=256, lift=True),
    Sum(4, width=512, stored=256, predict=None, lift=True, blocks=3, history_blocks=(3, 2)),
]
LONG_SUMS = [  # tiles and ranges of Triton's are for its own tests
    Sum(3, axis="channel", predict=(256,), history_blocks=(0, 5, 8), blocks=11),  # the last tile is not whole
    Sum(4, predict=None, history_blocks=(15, 16), blocks=16),
    Sum(2, predict=(256,), history_blocks=(16, 3, 9), blocks=24),
]


@pytest.mark.parametrize(
    ("implementation", "case"),
    [  # a v6e works on more channels together, a v5p cuts an odd number of sequences in two
        (run, case)
        for run in sorted(RUNS)
        if run != "pallas_tpu-v7x"
        for case in {"pallas_tpu-v6e": (SUMS[0], LONG_SUMS[1]), "triton": SUMS}.get(run, SUMS + LONG_SUMS)
        if run != "pallas_tpu-v5p" or len(case.history_blocks) % 2
    ],
    indirect=["implementation"],
)
def test_accumulate(implementation: str, case: Sum) -> None:
    batch = len(case.history_blocks)
    below = quantized(jnp.asarray(random(batch, case.blocks, 128, case.width)), StreamSpec(case.width, 8))
    difference = random(2, batch, case.blocks, 128, case.stored, seed=1) / 4
    stream = quantized(jnp.asarray(difference), StreamSpec(case.stored, case.bits, case.axis))
    predict = lift = None
    expected = np.asarray(dequantized(stream))[1].astype(np.float64)
    if case.lift:
        lift = random(case.stored, case.width, seed=2) / 16
        expected = expected @ lift
    if case.predict is not None:
        widths = (case.width, *case.predict)
        predict = [random(a, b, seed=3) / 16 for a, b in itertools.pairwise(widths)]
        x = np.asarray(dequantized(below)).astype(np.float64)
        for matrix in predict:
            x = x @ matrix
        expected = expected + x
    accumulation = Accumulation(
        None if predict is None else tuple(jnp.asarray(matrix) for matrix in predict),
        None if lift is None else jnp.asarray(lift),
    )

    call = Accumulate(below, stream, accumulation, jnp.asarray(case.history_blocks), jnp.int32(1))
    total = run(call, implementation)
    assert total.spec == below.spec
    scale = np.repeat(np.asarray(total.scale, np.float64), 128, axis=-1)
    for row, history_blocks in enumerate(case.history_blocks):
        # half a step of the grid, and of the products that bfloat16 rounds
        error = np.abs(np.asarray(dequantized(total))[row, :history_blocks] - expected[row, :history_blocks])
        assert (error <= 0.51 * scale[row, :history_blocks] + TOLERANCE.get(implementation, KERNEL_TOLERANCE)).all()
        # as fine a grid as the reference has
        spread = expected[row, :history_blocks].reshape(history_blocks, 128, case.width // 128, 128)
        finest = (spread.max(-1) - spread.min(-1)) / 255
        assert (np.asarray(total.scale, np.float64)[row, :history_blocks] <= 1.05 * finest + 1e-4).all()


@dataclasses.dataclass(frozen=True)
class Quantized:
    """One call of `quantize`."""

    bits: int
    axis: str = "token"
    group: int = 0
    width: int = 256
    blocks: int = 2
    dtype: str = "bfloat16"
    clip: bool = False


QUANTIZED = [
    Quantized(4),
    Quantized(4, "channel"),
    Quantized(2, group=256, width=768, blocks=11),  # the last tile is not whole
    Quantized(3, "channel", width=384, blocks=1),
    Quantized(8, "channel", dtype="float32"),
    Quantized(3, group=384, width=384, dtype="float32"),
    Quantized(8, blocks=9),
    Quantized(2, clip=True),
    Quantized(2, "channel", clip=True),
    Quantized(3, group=256, width=512, dtype="float32", clip=True),
    Quantized(4, "channel", blocks=9, clip=True),
]


@pytest.mark.parametrize("implementation", ["pallas_tpu"], indirect=True)
@pytest.mark.parametrize("case", QUANTIZED)
def test_quantize(implementation: str, case: Quantized) -> None:
    spec = StreamSpec(case.width, case.bits, case.axis, case.group, clip=case.clip)
    x = random(2, case.blocks, 128, case.width) + 3 * random(case.width)
    x[0, 0, :, :128] = 0.75  # no spread
    levels = np.random.default_rng(1).integers(0, 2**case.bits, (128, case.width))
    levels[[0, 1]] = levels[:, ::128] = 0  # every group has the lowest and
    levels[[2, 3]] = levels[:, 1::128] = 2**case.bits - 1  # the highest level
    x[1, 0] = levels / 8 - 2  # on the grid
    x = jnp.asarray(x, case.dtype)
    got = run(Quantize(x, spec), implementation)
    expected = quantized(x, spec)
    assert got.spec == spec
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected)
    np.testing.assert_array_equal(got.scale, expected.scale)
    np.testing.assert_array_equal(got.zero, expected.zero)
    codes, expected_codes = (np.asarray(unpacked(b.planes, case.bits)).astype(int) for b in (got, expected))
    assert np.abs(codes - expected_codes).max() <= 1
    group = (1, spec.group) if case.axis == "token" else (128, 1)
    scale, zero = (np.kron(np.asarray(a, np.float64), np.ones(group)) for a in (got.scale, got.zero))
    exact = np.asarray(x, np.float64)
    within = exact.clip(zero, zero + (2**case.bits - 1) * scale) if case.clip else exact
    error = np.abs(np.asarray(dequantized(got), np.float64) - within)
    assert (error <= scale * (0.5 + 2.0**-12)).all()
    if case.clip:
        assert (within != exact).any()
        return
    np.testing.assert_array_equal(np.asarray(dequantized(got))[1, 0], np.asarray(x, np.float32)[1, 0])


@pytest.mark.parametrize("implementation", ["pallas_tpu"], indirect=True)
def test_numbers_that_are_none_spoil_their_group_alone(implementation: str) -> None:
    x = random(1, 1, 128, 256)
    for axis, clip in itertools.product(("token", "channel"), (False, True)):
        spoiled = x.copy()
        spoiled[0, 0, 5, 9], spoiled[0, 0, 77, 130] = np.inf, np.nan
        spec = StreamSpec(256, 4, axis, clip=clip)
        values = [
            np.asarray(dequantized(run(Quantize(jnp.asarray(a), spec), implementation)))[0, 0] for a in (x, spoiled)
        ]
        same = values[0] == values[1]
        if axis == "token":
            same[5, :128] = same[77, 128:] = True
        else:
            same[:, [9, 130]] = True
        assert same.all()


def test_widths_that_do_not_fit_are_an_error() -> None:
    blocks = quantized(jnp.zeros((1, 1, 128, 32)), StreamSpec(32, 4))
    with pytest.raises(ConfigError, match=r"width 32 cannot be multiplied by a .16, 8. weight"):
        pallas_kernels.run(RematProject(blocks, jnp.zeros((16, 8))))
    with pytest.raises(ConfigError, match="vectors of width 16 are no stream of width 32"):
        pallas_kernels.run(Quantize(jnp.zeros((1, 1, 128, 16)), StreamSpec(32, 4)))


def test_heads_and_skips_that_do_not_fit_are_an_error() -> None:
    stream = quantized(jnp.zeros((1, 1, 1, 128, 96)), StreamSpec(96, 4))
    geometry = Geometry(jnp.zeros((1, 1), jnp.int32), NO_WINDOW, jnp.zeros(16), 1.0)

    def attend(num_kv_heads: int, value_heads: int, skip: tuple[int, ...] = (1,)) -> None:
        q, blocks = jnp.zeros((1, 1, 4, 32)), jnp.ones(1, jnp.int32)
        operands = q, stream, KeyRebuild(), None, blocks, geometry, 0
        pallas_kernels.run(DecodeAttention(*operands, num_kv_heads, value_heads, skip=jnp.zeros(skip)))

    with pytest.raises(ConfigError, match="4 query heads cannot share 3 key/value heads"):
        attend(3, 3)
    with pytest.raises(ConfigError, match="width 96 cannot be split into 4 heads; value_heads is 1, or num_kv_heads=2"):
        attend(2, 4)
    with pytest.raises(ConfigError, match=r"skip has shape \(\), and there are 1 sequences; give one number for each"):
        attend(2, 2, ())


def test_sums_that_do_not_fit_are_an_error() -> None:
    wide, narrow = (quantized(jnp.zeros((1, 1, 1, 128, n)), StreamSpec(n, 4)) for n in (32, 16))
    below = quantized(jnp.zeros((1, 1, 128, 32)), StreamSpec(32, 8))

    def add(stream: Blocks, *matrices: jax.Array) -> None:
        pallas_kernels.run(Accumulate(below, stream, Accumulation(matrices), jnp.ones(1, jnp.int32), 0))

    with pytest.raises(ConfigError, match=r"a sum of width 32 cannot be had from parts of width .16."):
        add(narrow)
    with pytest.raises(ConfigError, match=r"a sum of width 32 cannot be had from parts of width .32, 8."):
        add(wide, jnp.zeros((32, 8)))
