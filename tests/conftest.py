"""What the tests share: small random models and the trained ones beside the project."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu is there to compile with; no test runs on another device
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # it asks a cloud's metadata server otherwise
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing touches a TPU: other programs may use libtpu meanwhile
os.environ["NPROC"] = str(max(8, os.cpu_count() or 1))  # warpgroups of interpreted GPU kernels block a thread each

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from xquant_jax.cache.methods.base import FactorSource
from xquant_jax.cache.methods.learned import Need
from xquant_jax.calibration.calibrate import calibrate
from xquant_jax.config import ModelConfig
from xquant_jax.model.factors import factor_source
from xquant_jax.model.transformer import Transformer
from xquant_jax.numerics.rope import Rope

# what is combined says which axes it means and has one type
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# eight CPU devices for the tests of sharding; everything else runs on the first. A program is compiled in one piece, as
# the workers of the tests have a core each
FLAGS = "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers, width 32, four query heads on two key/value heads of dimension 8, float32."""
    config = ModelConfig(
        vocab_size=61,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=48,
        norm_eps=1e-5,
        rope=Rope(),
        sliding_windows=(None, None),
        dtype="float32",
    )
    return dataclasses.replace(config, **changes)


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """A transformer with random parameters; with a source of factors."""

    transformer: Transformer
    params: Any
    implementation: str | None = None
    mesh: None = None

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    @property
    def source(self) -> FactorSource:
        return factor_source(self.config, self.params["layers"], self.calibrated)

    def calibrated(self, need: Need) -> dict[str, Any]:
        text = random_tokens(self.config, 4, 256, seed=7)
        return jax.tree.map(jnp.asarray, calibrate(self, text, [need])[0])


def random_model(config: ModelConfig, seed: int = 0) -> RandomModel:
    """Weights, biases and norms all random, large enough that attention matters for the logits."""
    transformer = Transformer(config)
    shapes = jax.eval_shape(
        lambda: transformer.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method="score")["params"]
    )
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name == "scale":
            values = 1 + 0.2 * rng.standard_normal(leaf.shape)
        elif name == "kernel":
            values = 1.5 * rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[-2])
        else:
            values = 0.5 * rng.standard_normal(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return RandomModel(transformer, jax.tree_util.tree_map_with_path(draw, shapes))


def random_tokens(config: ModelConfig, *shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape, dtype=np.int32)


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """Collects an entry for every program that XLA compiles inside the block."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with trained models and texts that may lie beside the project."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared folder with trained models beside the project")
    return SHARED


MANY_MAPS, MOST_MAPS = 25_000, 45_000
"""Memory maps of a process from which on compiled programs are forgotten, between two files and between two tests:
every program has dozens to hundreds, and Linux allows 65,530; beyond, the compiler crashes."""


def forget_programs(many: int = MANY_MAPS) -> None:
    """Frees compiled programs if there are many."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > many:
        jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    yield
    forget_programs()


@pytest.fixture(autouse=True)
def _not_too_many_programs() -> Iterator[None]:
    yield
    forget_programs(MOST_MAPS)


@pytest.fixture(scope="session", autouse=True)
def _programs_compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Both processes of `make test`, and the commands that tests start, keep what they compile in one folder: of this
    run, or one that JAX is told of."""
    own = tmp_path_factory.getbasetemp()
    of_this_run = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "programs"
    options = {
        "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(of_this_run),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that are optimized run last, so that compiled programs are forgotten once and not between any two."""
    items.sort(key=lambda item: item.get_closest_marker("optimized") is not None)


@pytest.fixture(autouse=True)
def _optimizations(request: pytest.FixtureRequest) -> None:
    """Compiling takes most of the time of the tests: only those marked `optimized` have code made as users have it."""
    disable = request.node.get_closest_marker("optimized") is None
    if disable != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", disable)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(disable))  # of commands that a test starts
        jax.clear_caches()  # they are not told apart by it
