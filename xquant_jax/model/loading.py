"""From a checkpoint on disk to a model in memory."""

import dataclasses
from functools import cached_property, partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from converters import FOLDED, layer_factors, open_checkpoint
from converters.converted import ConvertedCheckpoint
from converters.shards import read_json
from converters.svd import factor_shapes
from pallas_kernels import api
from xquant_jax import sharding
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.methods.base import FactorSource
from xquant_jax.cache.methods.learned import Need
from xquant_jax.cache.partition import PER_HEAD_PARAMS, partition_of
from xquant_jax.config import ModelConfig
from xquant_jax.errors import CheckpointError, ConfigError
from xquant_jax.model.calibration_file import FILE, Calibration, fingerprint
from xquant_jax.model.tokenizer import Tokenizer
from xquant_jax.model.transformer import Transformer
from xquant_jax.model.weights import computed_once, parameter_specs, read_parameters, stack_layers
from xquant_jax.parameters import build_tree

DTYPES = ("bfloat16", "float16", "float32")

DEMO = Path(str(files("xquant_jax") / "demo"))
"""The model that ships with the package."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model: parameters on the device, and the checkpoint that further factors are read from."""

    transformer: Transformer
    params: Any
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    dtype: str
    checkpoint: Any
    calibration: Path  # file of what `xquant calibrate` found; need not exist
    implementation: str | None = None  # of the kernels
    mesh: Mesh | None = None  # devices that the parameters are spread over
    _factors: dict[tuple[str, bool], Any] = dataclasses.field(default_factory=dict, repr=False)
    _built: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    def on(self, mesh: Mesh | None) -> "Model":
        """The model spread over a mesh; itself if it is, or if `mesh` is None. `load(..., mesh=...)` spares the copy.

        Raises `ConfigError` if it lies on another mesh or its weights do not divide.
        """
        if mesh is None:
            return self
        mesh = sharding.checked(mesh)
        if self.mesh is None:
            sharding.check_model(self.config, mesh)
            params = sharding.place(self.params, parameter_specs(self.params), mesh)
            return dataclasses.replace(self, params=params, mesh=mesh, _factors={}, _built={})
        if mesh != self.mesh:
            raise ConfigError(f"the model lies on {self.mesh}, not on {mesh}; load it with mesh=... of the one to use")
        return self

    def method_params(self, cache_config: CacheConfig) -> tuple[Any, ...]:
        """`CacheConfig.method_params`, on a mesh where the cache needs them; of the last cache they are kept."""
        if self._built.get("cache") != cache_config or self._built["params"] is not self.params:
            self._built.clear()  # before others take their place
            self._built.update(cache=cache_config, params=self.params, method_params=self._built_factors(cache_config))
        return self._built["method_params"]

    def _built_factors(self, cache_config: CacheConfig) -> tuple[Any, ...]:
        if self.mesh is None:
            return cache_config.method_params(self.source)
        with sharding.using(self.mesh):
            partition = partition_of(cache_config, self.config)
        method_params = cache_config.method_params(self.source if partition.channels else self._whole_source())
        return sharding.place(method_params, partition.stacked_params(method_params), self.mesh)

    @property
    def source(self) -> FactorSource:
        """Where cache methods find the matrices that they multiply with."""
        return FactorSource(self.config, self.params["layers"], self.svd, self.calibrated)

    def svd(self, kind: str, *, folded: bool = False, number: int | None = None) -> dict[str, Any]:
        """SVD factors of at least the first `number` layers (None: all) on a leading axis: read from a converted
        checkpoint where it has them (`converters.FOLDED`), computed otherwise. One stack serves all that ask for fewer.

        `folded`: of the weights with the attention norm's scale multiplied into them.
        """

        def compute(i: int) -> Any:
            kinds: Any = [kind]
            return next(iter(layer_factors(kinds, self.checkpoint.layer(i), self.config, folded=folded).values()))

        key, number = (kind, folded), number or self.config.num_layers
        if key not in self._factors or len(jax.tree.leaves(self._factors[key])[0]) < number:
            stored = FOLDED.get(kind) == folded  # pyright: ignore[reportCallIssue, reportArgumentType]
            read = partial(self.checkpoint.factors, kind) if stored else compute
            if self.mesh is not None:
                shapes = build_tree(factor_shapes(kind, self.config).items())  # pyright: ignore[reportArgumentType]
                specs = sharding.named_specs(shapes, PER_HEAD_PARAMS if kind == "per_head" else {})
                if stored and isinstance(self.checkpoint, ConvertedCheckpoint):
                    read = partial(read, sharding=sharding.named(specs, self.mesh))
                else:
                    read = computed_once(read, shapes, specs, self.mesh)
            self._factors[key] = stack_layers(number, read, self.dtype)
        return self._factors[key]

    def _whole_source(self) -> FactorSource:
        """On a mesh, a source of what every device has whole."""
        whole = partial(sharding.place, specs=sharding.P(), mesh=self.mesh)
        names = ("key", "value", "key_norm", "attention_norm")
        layers = {name: whole(tree) for name, tree in self.params["layers"].items() if name in names}
        return FactorSource(
            self.config, layers, lambda *kind, **which: whole(self.svd(*kind, **which)), self.calibrated
        )

    @cached_property
    def fingerprint(self) -> str:
        """Of some of the weights: whose calibration a file holds."""
        return fingerprint(self.checkpoint)

    @cached_property
    def _calibration(self) -> Calibration:
        return Calibration.read(self.calibration, self.fingerprint)

    def calibration_hash(self, cache_config: CacheConfig) -> str | None:
        """Of the calibration file, if it is there and the cache takes something from it."""
        calibrated = any(method.needs(self.config) for method, _ in cache_config.segments(self.config))
        return sha256(self.calibration.read_bytes()).hexdigest() if calibrated and self.calibration.exists() else None

    def calibrated(self, need: Need) -> dict[str, Array]:
        """What `xquant calibrate` found on text. Raises `ConfigError` if it was not run, or with another model."""
        found = self._calibration.get(need) if self.calibration.exists() else None
        if found is None:
            lacks = "does not hold it" if self.calibration.exists() else "does not exist"
            raise ConfigError(
                f"cache {need.cache} needs calibration on text, and {self.calibration} {lacks}; run "
                f"xquant calibrate {self.checkpoint.path} --text FILE --cache {need.cache}"
            )
        return {name: jnp.asarray(array) for name, array in found.items()}


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    implementation: str | None = None,
    calibration: str | Path | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Loads a converted directory, a Hugging Face directory, or `"demo"`, the model that ships with the package.

    dtype: of parameters and activations; by default the checkpoint's own, but float32 on CPU, where narrower types
        are emulated and several times slower
    implementation: of the kernels, by default the best for the device
    calibration: file that `xquant calibrate` wrote, by default `calibration.safetensors` in the directory
    mesh: devices to spread the weights over (`make_mesh`); every process reads its own devices' shards only

    Raises `CheckpointError` for files that are missing or inconsistent, `ConfigError` for a model that is not
    supported.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is not supported; choose {', '.join(DTYPES)}")
    if calibration is not None and not Path(calibration).exists():
        raise ConfigError(f"calibration={calibration} does not exist; xquant calibrate writes one")
    api.check(implementation)  # raises here, not at the first step that would use it
    directory = DEMO if str(path) == "demo" else Path(path)
    checkpoint = open_checkpoint(directory)
    config = checkpoint.model_config
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else config.dtype)
    if mesh is not None:
        mesh = sharding.checked(mesh)
        sharding.check_model(config, mesh)
    tokenizer = directory / "tokenizer.json"
    return Model(
        transformer=Transformer(config),
        implementation=implementation,
        params=read_parameters(checkpoint, dtype, mesh),
        tokenizer=Tokenizer.from_file(tokenizer) if tokenizer.exists() else None,
        stop_ids=_stop_ids(directory, checkpoint.config),
        dtype=dtype,
        checkpoint=checkpoint,
        calibration=Path(calibration) if calibration is not None else directory / FILE,
        mesh=mesh,
    )


def _stop_ids(directory: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: of generation_config.json where there is one, else of config.json."""
    path = directory / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    ids = settings.get("eos_token_id", config.get("eos_token_id"))
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) and 0 <= i < 2**31 for i in ids):
        raise CheckpointError(f"{path}: eos_token_id={ids} is neither a token id nor a list of them")
    return tuple(ids)
