"""From a checkpoint on disk to a model in memory."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from converters import local_directory, open_checkpoint
from converters.shards import read_json
from pallas_kernels import api
from xquant_jax import sharding
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.methods.base import FactorSource
from xquant_jax.cache.methods.learned import Need, Prediction
from xquant_jax.calibration.calibrate import calibrate, drawn_tokens
from xquant_jax.config import ModelConfig
from xquant_jax.errors import CheckpointError, ConfigError
from xquant_jax.model.calibration_file import FILE, Calibration, fingerprint
from xquant_jax.model.chat_template import ChatTemplate
from xquant_jax.model.factors import Kept, Origin, factor_source, layer_on_host, method_params
from xquant_jax.model.tokenizer import Tokenizer
from xquant_jax.model.transformer import Transformer
from xquant_jax.model.weights import parameter_specs, read_parameters, weights_checksum
from xquant_jax.parameters import Layers, layers_of

DTYPES = ("bfloat16", "float16", "float32")

DEMO = Path(str(files("xquant_jax") / "demo"))
"""The model that ships with the package."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model: parameters on the device, and where they come from.

    `dataclasses.replace(model, params=...)` is a model of other weights: what its caches multiply with is made of them.
    Threads may share a model.
    """

    transformer: Transformer
    params: Any
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    generation_config: Mapping[str, Any]  # generation_config.json
    stop_ids: tuple[int, ...]
    dtype: str
    origin: Origin
    calibration: Path  # file of what `xquant calibrate` found; need not exist
    implementation: str | None = None  # of the kernels
    mesh: Mesh | None = None  # devices that the parameters are spread over
    _kept: Kept = dataclasses.field(default_factory=Kept, init=False, repr=False)  # `dataclasses.replace` starts anew

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    @property
    def layers(self) -> Layers:
        """The parameters of all layers."""
        return layers_of(self.params)

    @property
    def checkpoint(self) -> Any:
        """What the model was loaded from: a `converters.Checkpoint`."""
        return self.origin.checkpoint

    @property
    def positions(self) -> int | None:
        """Tokens of a sequence that the model was made for: `max_position_embeddings`, or what its RoPE scaling makes
        of the length of pretraining. None where config.json does not say."""
        said = self.checkpoint.config.get("max_position_embeddings")
        rope = self.config.rope
        if rope.scaling == "dynamic":
            return rope.longest
        return max(said, int(rope.factor * rope.original_positions)) if isinstance(said, int) else None

    def on(self, mesh: Mesh | None) -> "Model":
        """The model spread over a mesh; itself if it is, or if `mesh` is None. `load(..., mesh=...)` spares the copy.

        Raises `ConfigError` if it lies on another mesh or its weights do not divide.
        """
        if mesh is None:
            return self
        mesh = sharding.checked(mesh)
        if self.mesh is None:
            sharding.check_model(self.config, mesh)
            specs = parameter_specs(self.config, scan_layers=self.transformer.scan_layers)
            params = sharding.place(self.params, specs, mesh)
            origin = self.origin.moved(self.layers, layers_of(params))
            return dataclasses.replace(self, params=params, origin=origin, mesh=mesh)
        if mesh != self.mesh:
            raise ConfigError(f"the model lies on {self.mesh}, not on {mesh}; load it with mesh=... of the one to use")
        return self

    @property
    def source(self) -> FactorSource:
        """Where cache methods find the matrices that they multiply with."""
        return self._source(self._kept)

    def _source(self, kept: Kept) -> FactorSource:
        return factor_source(
            self.config,
            self.layers,
            self.calibrated,
            origin=self.origin,
            mesh=self.mesh,
            kept=kept,
        )

    def method_params(self, cache_config: CacheConfig) -> tuple[Any, ...]:
        """`CacheConfig.method_params`, on a mesh where the cache needs them; of the last cache they are kept."""

        def compute() -> tuple[CacheConfig, tuple[Any, ...]]:
            scan_layers = self.transformer.scan_layers
            # where each layer has arrays of its own, the stacks they are picked from are not kept beside them
            source = self._source(self._kept if scan_layers else Kept())
            return cache_config, method_params(source, cache_config, self.mesh, scan_layers=scan_layers)

        return self._kept.get("method_params", compute, lambda found: found[0] == cache_config)[1]

    @property
    def fingerprint(self) -> str:
        """Of some of the weights: whose calibration a file holds. Before they were rounded to the model's type, where
        they are still those of the checkpoint."""
        layers = self.layers
        layer = self.checkpoint.layer if self.origin.holds(layers) else partial(layer_on_host, layers, self.mesh)
        return self._kept.get("fingerprint", lambda: fingerprint(layer, self.config.num_layers))

    @property
    def checksum(self) -> str:
        """Of all weights as they are, see `weights_checksum`."""
        return self._kept.get("checksum", lambda: f"{weights_checksum(self.params):08x}")

    def calibration_hash(self, cache_config: CacheConfig) -> str | None:
        """Of the calibration file, if it is there and the cache takes something from it.

        Raises `ConfigError` if the file lacks what the cache cannot do without.
        """
        needs = [need for method, _ in cache_config.segments(self.config) for need in method.needs(self.config)]
        for need in needs:
            if not isinstance(need, Prediction):
                self.calibrated(need)
        return sha256(self.calibration.read_bytes()).hexdigest() if needs and self.calibration.exists() else None

    def calibrated(self, need: Need) -> dict[str, Array]:
        """What `xquant calibrate` found on text. Raises `ConfigError` if it was not run, or with other weights.

        Predictions are found on tokens drawn at random where the file does not hold those of these weights.
        """
        found = None
        if self.calibration.exists() and not (isinstance(need, Prediction) and self._of_other_weights()):
            file = self._kept.get("calibration", lambda: Calibration.read(self.calibration, self.fingerprint))
            found = file.get(need)
        if found is None and isinstance(need, Prediction):
            found = self._kept.get(need, lambda: calibrate(self, drawn_tokens(self), [need])[0])
        if found is None:
            lacks = "does not hold it" if self.calibration.exists() else "does not exist"
            raise ConfigError(
                f"cache {need.cache} needs calibration on text, and {self.calibration} {lacks}; run "
                f"xquant calibrate {self.checkpoint.path} --text FILE --cache {need.cache}"
            )
        return {name: jnp.asarray(array) for name, array in found.items()}

    def _of_other_weights(self) -> bool:
        """Whether these weights have taken the place of those that the calibration file is of."""
        return not self.origin.holds(self.layers)


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    implementation: str | None = None,
    calibration: str | Path | None = None,
    context: int | None = None,
    mesh: Mesh | None = None,
    scan_layers: bool | None = None,
) -> Model:
    """Loads a converted directory, a Hugging Face directory, or `"demo"`, the model that ships with the package.

    A name on the Hugging Face Hub, `"org/model"` or `"org/model@revision"`, is downloaded to its cache (extra `hub`).

    dtype: of parameters and activations; by default the checkpoint's own, but float32 on CPU, where narrower types
        are emulated and several times slower
    implementation: of the kernels, by default the best for the device
    calibration: file that `xquant calibrate` wrote, by default `calibration.safetensors` in the directory
    context: tokens of the longest sequence that will be run, prompt and answer together, for models whose RoPE depends
        on it (`longrope`); by default what such a model was first trained on
    mesh: devices to spread the weights over (`make_mesh`); every process reads its own devices' shards only
    scan_layers: whether compiled programs loop over the layers, whose weights are then stacked, or have them one after
        another, which takes longer to compile; by default they loop, but on GPUs, where XLA would copy each layer's
        weights out of the stack for every token

    Raises `CheckpointError` for files that are missing or inconsistent, `ConfigError` for a model that is not
    supported.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is not supported; choose {', '.join(DTYPES)}")
    if calibration is not None and not Path(calibration).exists():
        raise ConfigError(f"calibration={calibration} does not exist; xquant calibrate writes one")
    if not isinstance(path, str | Path):
        raise ConfigError(f"{path!r} is no model; give a directory, a name on the Hub, or 'demo'")
    if context is not None and (not isinstance(context, int) or context < 1):
        raise ConfigError(f"context={context!r} is not possible; give a whole number of tokens")
    api.check(implementation)  # raises here, not at the first step that would use it
    directory = DEMO if str(path) == "demo" else local_directory(path)
    checkpoint = open_checkpoint(directory)
    config = checkpoint.model_config
    if context is not None:
        config = dataclasses.replace(config, rope=config.rope.for_length(context))
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else config.dtype)
    if mesh is not None:
        mesh = sharding.checked(mesh)
        sharding.check_model(config, mesh)
    tokenizer, settings = directory / "tokenizer.json", directory / "generation_config.json"
    generation_config = read_json(settings) if settings.exists() else {}
    if scan_layers is None:
        scan_layers = scans_layers()
    params = read_parameters(checkpoint, dtype, mesh, scan_layers=scan_layers)
    return Model(
        transformer=Transformer(config, scan_layers),
        implementation=implementation,
        params=params,
        tokenizer=Tokenizer.from_file(tokenizer) if tokenizer.exists() else None,
        chat_template=ChatTemplate.from_directory(directory),
        generation_config=generation_config,
        stop_ids=_stop_ids(generation_config, checkpoint),
        dtype=dtype,
        origin=Origin.of(checkpoint, layers_of(params)),
        calibration=Path(calibration) if calibration is not None else directory / FILE,
        mesh=mesh,
    )


def scans_layers() -> bool:
    """Whether models loop over their layers unless told: everywhere but on GPUs."""
    return jax.default_backend() != "gpu"


def _stop_ids(generation_config: dict[str, Any], checkpoint: Any) -> tuple[int, ...]:
    """End-of-sequence ids: of generation_config.json where it names them, else of config.json."""
    said = "generation_config.json" if "eos_token_id" in generation_config else "config.json"
    ids = generation_config.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) and 0 <= i < 2**31 for i in ids):
        raise CheckpointError(f"{checkpoint.path / said}: eos_token_id={ids} is neither a token id nor a list of them")
    return tuple(ids)
