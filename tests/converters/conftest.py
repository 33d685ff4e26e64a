"""Small checkpoints that look like Hugging Face's, written without transformers or torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """A config.json of a tiny model: D 24, H 4, K 2, d 6, F 20, L 2. A change to `...` removes the field."""
    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": 30,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    } | changes
    return {name: value for name, value in config.items() if value is not ...}


def tensors_of(config: dict[str, Any], dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face's names, Linear weights as [out, in]."""
    random = np.random.default_rng(seed)
    width, mlp, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    family, bias = config["model_type"], config.get("attention_bias", False)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocabulary, width)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (width,)
        shapes[prefix + "post_attention_layernorm.weight"] = (width,)
        linear = {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (mlp, width),
            "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
        }
        for name, shape in linear.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if family == "qwen2":
                biased = name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
            else:
                biased = bias if "self_attn" in name else config.get("mlp_bias", False)
            if biased:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        if family == "qwen3":
            shapes[prefix + "self_attn.q_norm.weight"] = shapes[prefix + "self_attn.k_norm.weight"] = (
                config["head_dim"],
            )
    return {name: random.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}


def write(
    directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None, shards: int = 1
) -> Path:
    """Writes config.json and the tensors: one file, or an index and so many shards."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(config) if tensors is None else tensors
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    placed = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(placed.values()):
        save_file({name: tensors[name] for name in tensors if placed[name] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return directory


@pytest.fixture
def tiny_config() -> Callable[..., dict[str, Any]]:
    """`config_of`."""
    return config_of


@pytest.fixture
def tiny_tensors() -> Callable[..., dict[str, np.ndarray]]:
    """`tensors_of`."""
    return tensors_of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint to a directory of the test and returns its path; Llama unless a config is given."""

    def make(
        config: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray] | None = None,
        shards: int = 1,
        name: str = "source",
    ) -> Path:
        if config is None:
            embedding = (tensors or {}).get("model.embed_tokens.weight", np.zeros(0, np.float32))
            config = config_of("llama", torch_dtype=embedding.dtype.name)
        return write(tmp_path / name, config, tensors, shards)

    return make
