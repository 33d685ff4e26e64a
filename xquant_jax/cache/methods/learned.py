"""What a cache method can ask calibration for. Every array it gets has the leading axis L."""

import dataclasses

from xquant_jax.numerics.quantization import StreamSpec


@dataclasses.dataclass(frozen=True)
class Codebooks:
    """Levels between 0 and 1 of each layer's keys and values: `key` and `value`, [L, 2^bits], rising."""

    bits: int
    outliers: float
    sink: int
    key: StreamSpec
    value: StreamSpec

    @property
    def name(self) -> str:
        return f"codebooks/{self.cache}"

    @property
    def cache(self) -> str:
        """A cache that has this need."""
        return f"kvquant:{self.bits},outliers={self.outliers},sink={self.sink}"


@dataclasses.dataclass(frozen=True)
class Directions:
    """Prediction of a latent from that of the layer below through its `rank` principal directions.

    `down` [L, C, rank]: P, the directions of the layer below (uncentred), the strongest first
    `up` [L, rank, C]: P^T A_below^+ A of the layer; of layer 0, which nothing is below, both are zero

    A file may hold more directions than are asked for.
    """

    basis: str
    folded: bool
    rank: int

    @property
    def name(self) -> str:
        return f"directions/basis={self.basis},input={self._input}"

    @property
    def cache(self) -> str:
        """A cache that has this need."""
        return f"xquant-cl:2,predict=latent,basis={self.basis},input={self._input},rank={self.rank}"

    @property
    def _input(self) -> str:
        return "unit_norm" if self.folded else "post_norm"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The latent z = X U_kv of a layer from that of the layer below, by least squares over tokens.

    `predict` [L, C, C]: P, with z close to z_below P
    `residual` [L, C]: mean squares of z - z_below P; of z itself in layer 0, which nothing is below

    Found on tokens drawn at random where no text was given.
    """

    folded: bool

    @property
    def name(self) -> str:
        return f"prediction/input={self._input}"

    @property
    def cache(self) -> str:
        """A cache that has this need."""
        return f"xquant-cl:2,predict=learned,input={self._input}"

    @property
    def _input(self) -> str:
        return "unit_norm" if self.folded else "post_norm"


Need = Codebooks | Directions | Prediction
