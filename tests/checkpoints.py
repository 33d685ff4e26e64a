"""Small Hugging Face directories whose models spread over eight devices."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.converters.conftest import config_of, tensors_of


def write_checkpoint(directory: Path, *, multi_head: bool = False, layers: int = 3, vocab_size: int = 64) -> Path:
    """Eight key/value heads; attention is smooth, so that a code that rounds the other way
    makes little difference."""
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "head_dim": 8,
    }
    config = config_of("llama", **sizes, num_attention_heads=8 if multi_head else 16, num_key_value_heads=8)

    def scaled(name: str, values: np.ndarray) -> np.ndarray:
        if "norm" in name:
            return 1 + 0.2 * values
        return {"model.embed_tokens.weight": 1.0, "lm_head.weight": 0.5}.get(name, 0.05) * values

    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: scaled(name, values).astype(np.float32) for name, values in tensors_of(config).items()}
    save_file(tensors, directory / "model.safetensors")
    return directory
