"""Trains the demo model: a small Llama-style model on the source of Python's standard library.

    python scripts/train_demo.py --out DIR [--held-out FILE] [--minutes 60]

Writes a Hugging Face directory (config.json, tokenizer.json, model.safetensors in bfloat16). The running
interpreter's own library is the corpus; modules whose text occurs in FILE are left out and measured at the end.
"""

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_dtypes import bfloat16
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from converters.families.family import LAYER_NAMES, OUTER_NAMES
from xquant_jax.config import ModelConfig
from xquant_jax.model.transformer import Transformer
from xquant_jax.numerics.rope import Rope
from xquant_jax.parameters import layer_parameters, leaves_of, outer_parameters

VOCABULARY = 4096
STAGES = ((0.75, 256, 16), (1.0, 512, 8))  # until this fraction of the time: context, sequences per batch
END_OF_TEXT = "<|endoftext|>"
TABLES = ("encodings", "pydoc_data", "site-packages")  # generated tables, not source that somebody wrote

CONFIG = ModelConfig(
    vocab_size=VOCABULARY,
    width=256,
    num_layers=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=512,
    norm_eps=1e-5,
    rope=Rope(theta=10_000.0),
    sliding_windows=(None,) * 12,
    tied_embeddings=True,
    dtype="float32",
)


def read_modules() -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in library.rglob("*.py") if p.relative_to(library).parts[0] not in TABLES)
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    return [text for text in texts if text.strip()]


def train_tokenizer(modules: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(modules, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, modules: list[str]) -> np.ndarray:
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(modules)
    return np.concatenate([np.asarray([end, *e.ids], np.int32) for e in encoded])


def batches(tokens: np.ndarray, context: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Windows of context + 1 tokens; every epoch starts at another offset and in another order."""
    rng = np.random.default_rng(seed)
    while True:
        offset = rng.integers(context)
        starts = rng.permutation(np.arange(offset, len(tokens) - context - 1, context))
        for rows in starts[: len(starts) // batch * batch].reshape(-1, batch):
            yield np.stack([tokens[r : r + context + 1] for r in rows])


def make_optimizer() -> optax.GradientTransformation:
    """Muon for the matrices of the layers (Jordan et al. 2024), Adam for the rest, at peak learning rates."""

    def stacked_matrices(params: Any) -> Any:
        def dimensions(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
            stacked = any(getattr(key, "key", None) == "layers" for key in path)
            return optax.contrib.MuonDimensionNumbers(1, 2) if stacked and leaf.ndim == 3 else None

        return jax.tree_util.tree_map_with_path(dimensions, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            learning_rate=0.02,
            adam_learning_rate=3e-3,
            muon_weight_dimension_numbers=stacked_matrices,
            weight_decay=0.01,
        ),
    )


def loss_of(params: Any, window: jax.Array) -> jax.Array:
    logits: Any = Transformer(CONFIG).apply({"params": params}, window[:, :-1], method="score")
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()


def train(tokens: np.ndarray, minutes: float, seed: int) -> Any:
    """Trains for the time given: the learning rate warms up over 50 steps and falls linearly to nothing at the end."""
    params = Transformer(CONFIG).init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32), method="score")["params"]
    print(f"{sum(p.size for p in jax.tree.leaves(params)) / 1e6:.2f} M parameters, {len(tokens) / 1e6:.2f} M tokens")
    optimizer = make_optimizer()
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, window, factor):
        loss, gradients = jax.value_and_grad(loss_of)(params, window)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: factor * u, updates)), state, loss

    start, done, seen, recent = time.monotonic(), 0, 0, []
    for until, context, batch in STAGES:
        data = batches(tokens, context, batch, seed)
        while (spent := (time.monotonic() - start) / (minutes * 60)) < until:
            params, state, loss = step(params, state, next(data), min((done + 1) / 50, 1 - spent))
            recent.append(float(loss))
            done, seen = done + 1, seen + context * batch
            if done % 50 == 0:
                print(
                    f"{spent:4.0%}  step {done}  {seen / 1e6:.2f} M tokens  loss {np.mean(recent):.4f}",
                    flush=True,
                )
                recent.clear()
    return params


def save(params: Any, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    c = CONFIG
    end = tokenizer.token_to_id(END_OF_TEXT)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope.theta,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": c.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": end, "eos_token_id": end}, indent=2) + "\n")
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))

    tensors = {}
    for row in outer_parameters(c):
        tensors[OUTER_NAMES[row.path]] = leaves_of(params)[row.path]
    for row in layer_parameters(c):
        for i, array in enumerate(leaves_of(params["layers"])[row.path]):
            tensors[f"model.layers.{i}.{LAYER_NAMES[row.path]}"] = array.T if row.is_kernel else array
    tensors = {name: np.ascontiguousarray(np.asarray(t).astype(bfloat16)) for name, t in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, help="text of modules that must not be trained on")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time on this machine")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    held_out = arguments.held_out.read_text(encoding="utf-8") if arguments.held_out else ""
    modules = [text for text in read_modules() if text.strip() not in held_out]
    print(f"Python {sys.version.split()[0]}: {len(modules)} modules", flush=True)
    tokenizer = train_tokenizer(modules)
    params = train(encode(tokenizer, modules), arguments.minutes, arguments.seed)
    save(params, tokenizer, arguments.out)
    if held_out:
        tokens = encode(tokenizer, [held_out])
        windows = tokens[: len(tokens) // 513 * 513].reshape(-1, 513)[:64].reshape(-1, 8, 513)
        loss = np.mean([float(jax.jit(loss_of)(params, w)) for w in windows])
        print(f"held out: {loss:.4f} nats, perplexity {np.exp(loss):.2f}")


if __name__ == "__main__":
    main()
