"""Checkpoints: reading Hugging Face directories, converting them to Orbax, the SVD factors of projections."""

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.conversion import convert
from converters.converted import ConvertedCheckpoint
from converters.families import model_config
from converters.hub import local_directory
from converters.huggingface import HuggingFaceCheckpoint
from converters.svd import FACTOR_KINDS, FOLDED, FactorKind, layer_factors

__all__ = [
    "FACTOR_KINDS",
    "FOLDED",
    "Checkpoint",
    "ConvertedCheckpoint",
    "FactorKind",
    "HuggingFaceCheckpoint",
    "convert",
    "layer_factors",
    "local_directory",
    "model_config",
    "open_checkpoint",
]
