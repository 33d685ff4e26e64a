"""Writes the golden files of `tests/golden`: what Hugging Face computes, for tests without torch.

    python scripts/write_golden.py tests/golden [--models DIR]

It holds the list of tiny random checkpoints (a directory each: `config.json`, weights, and `golden.npz` with
tokens and logits), the checks that their logits depend on what they are there for, and the greedy
continuations of trained models, which are written only where a directory of those is given. The files are
described in `tests/golden/README.md`; `make golden` makes the environment, with the versions that
`tests/golden/versions.json` names.

Everything is drawn by numpy from fixed seeds, so the same versions write the same bytes.
"""

# pyright: reportMissingImports=false

import argparse
import dataclasses
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

LENGTHS = (40, 29, 17)  # tokens of each golden row; all longer than every sliding window below
NEW_TOKENS = 60  # of a greedy continuation

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LONG_SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}


def longrope(original: int) -> dict[str, Any]:
    """LongRoPE for heads of 12, of a model whose context in pretraining had `original` tokens."""
    return {
        "rope_type": "longrope",
        "rope_theta": 1_000.0,
        "short_factor": [1.0, 1.05, 1.25, 1.5, 2.0, 3.0],
        "long_factor": [1.1, 1.6, 2.75, 4.5, 8.0, 12.0],
        "original_max_position_embeddings": original,
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """One tiny checkpoint. `unlike` is a change of its config that must change the logits visibly."""

    name: str
    model: type[PreTrainedModel]
    config: dict[str, Any]
    unlike: dict[str, Any]
    max_shard_size: str = "1GB"


CASES = (
    Case(  # like Llama 2: multi-head, default RoPE
        "llama-mha",
        LlamaForCausalLM,
        {
            "hidden_size": 40,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "rms_norm_eps": 1e-5,
        },
        unlike={"rope_parameters": DEFAULT_ROPE | {"rope_theta": 20_000.0}},
    ),
    Case(  # like Llama 3.2: wavelengths 6, 30, 140, 664 fall into the high, middle and (twice) low band
        "llama-llama3",
        LlamaForCausalLM,
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 52,
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        unlike={"rope_parameters": DEFAULT_ROPE | {"rope_theta": 500.0}},
    ),
    Case(  # every bias that a Llama config can ask for
        "llama-linear-bias",
        LlamaForCausalLM,
        {
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 36,
            "num_hidden_layers": 3,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1_000.0, "factor": 4.0},
        },
        unlike={"rope_parameters": DEFAULT_ROPE | {"rope_theta": 1_000.0}},
    ),
    Case(  # H d = 64 differs from D = 32; the ramp of YaRN ends at pair 5 of 8
        "llama-yarn",
        LlamaForCausalLM,
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        unlike={"rope_parameters": DEFAULT_ROPE | {"rope_theta": 100.0}},
    ),
    Case(  # rows of up to 128 tokens have the default frequencies; 40 tokens of a model for 16 would have others
        "llama-dynamic",
        LlamaForCausalLM,
        LONG_SIZES | {"rope_parameters": DEFAULT_ROPE | {"rope_type": "dynamic", "factor": 4.0}},
        unlike={"max_position_embeddings": 16},
    ),
    Case(  # no row is longer than 64 tokens; the attention factor is sqrt(1 + ln 2 / ln 64), 128 positions over 64
        "llama-longrope-short",
        LlamaForCausalLM,
        LONG_SIZES | {"rope_parameters": longrope(original=64)},
        unlike={"rope_parameters": longrope(original=64) | {"short_factor": [1.0] * 6}},
    ),
    Case(  # every row is longer than 16 tokens; with an attention factor from `factor`
        "llama-longrope-long",
        LlamaForCausalLM,
        LONG_SIZES | {"rope_parameters": longrope(original=16) | {"factor": 4.0}},
        unlike={
            "rope_parameters": longrope(original=16) | {"factor": 4.0, "long_factor": longrope(16)["short_factor"]}
        },
    ),
    Case(
        "mistral-window",
        MistralForCausalLM,
        {
            "hidden_size": 36,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 8,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "sliding_window": 8,
        },
        unlike={"sliding_window": 9},
    ),
    Case(  # stored in several files, as every large checkpoint is
        "mistral-full",
        MistralForCausalLM,
        {
            "hidden_size": 36,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "rope_parameters": DEFAULT_ROPE | {"rope_theta": 1_000_000.0},
        },
        unlike={"sliding_window": 30},
        max_shard_size="24KB",
    ),
    Case(
        "qwen2-gqa",
        Qwen2ForCausalLM,
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
            "rope_parameters": DEFAULT_ROPE | {"rope_theta": 1_000_000.0},
        },
        unlike={"rope_parameters": DEFAULT_ROPE},
    ),
    Case(  # layer 0 sees everything, 1 and 2 look back 11 tokens
        "qwen2-mixed-windows",
        Qwen2ForCausalLM,
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 11,
            "max_window_layers": 1,
        },
        unlike={"max_window_layers": 2},
    ),
    Case(  # YaRN with every option written out
        "qwen2-yarn",
        Qwen2ForCausalLM,
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.25,
                "beta_fast": 8.0,
                "beta_slow": 0.5,
                "truncate": False,
            },
        },
        unlike={"rope_parameters": DEFAULT_ROPE | {"rope_theta": 1_000.0}},
    ),
    Case(  # H d = 80 differs from D = 32
        "qwen3-tied",
        Qwen3ForCausalLM,
        {
            "hidden_size": 32,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
            "rope_parameters": DEFAULT_ROPE | {"rope_theta": 1_000_000.0},
        },
        unlike={"rope_parameters": DEFAULT_ROPE},
    ),
    Case(  # H d = 48 differs from D = 32; biases on all four attention projections
        "qwen3-bias",
        Qwen3ForCausalLM,
        {
            "hidden_size": 32,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 8,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "attention_bias": True,
        },
        unlike={"attention_bias": False},
    ),
    Case(  # `layer_types` says which layers have a window, against what `max_window_layers` alone would say
        "qwen3-layer-types",
        Qwen3ForCausalLM,
        {
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 12,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        unlike={"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
)

PYTHON_PROMPT = 'def read_lines(path):\n    """Return the lines of a file."""'
PROMPTS = {
    "stories260K": "Once upon a time",
    "pystdlib-gqa": PYTHON_PROMPT,
    "pystdlib-mha": PYTHON_PROMPT,
}


def versions() -> dict[str, str]:
    """The versions that the golden files depend on, without the build tags of a platform."""
    modules = {"numpy": np, "tokenizers": tokenizers, "torch": torch, "transformers": transformers}
    return {name: module.__version__.split("+")[0] for name, module in modules.items()}


def random_tokens(case: Case, vocab_size: int) -> np.ndarray:
    """Rows of random tokens, padded on the right with zeros."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    tokens = rng.integers(0, vocab_size, (len(LENGTHS), max(LENGTHS)), dtype=np.int32)
    return np.where(np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None], tokens, 0)


def random_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight that depends on its name and shape only, large enough for attention to be sharp."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if "norm" in name:
        return rng.uniform(0.5, 1.5, shape)
    if name.endswith("bias"):
        return rng.normal(0, 0.5, shape)
    if "embed_tokens" in name:
        return rng.normal(0, 0.5, shape)
    gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.5
    return rng.normal(0, gain / shape[-1] ** 0.5, shape)  # torch stores [out, in]


def build(model: type[PreTrainedModel], config: dict[str, Any]) -> PreTrainedModel:
    """A float32 model with random weights; models of equal shapes get equal ones."""
    defaults = {"vocab_size": 64, "max_position_embeddings": 128, "rope_parameters": DEFAULT_ROPE}
    built = model(model.config_class(**(defaults | config), dtype="float32", attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(torch.from_numpy(random_weight(name, tuple(parameter.shape))))
    return built


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one row, computed alone."""
    row = torch.from_numpy(tokens.astype(np.int64))[None]
    return model(input_ids=row, use_cache=False).logits[0].numpy()


def change(before: np.ndarray, after: np.ndarray) -> float:
    """How far logits moved, in units of their own spread."""
    return float(np.std(after - before) / np.std(before))


def check_sensitivity(case: Case, model: PreTrainedModel, tokens: np.ndarray) -> None:
    """Fails unless the logits depend on the order of earlier tokens and on what the case is there for."""
    logits = logits_of(model, tokens)
    reordered = np.concatenate([tokens[-4::-1], tokens[-3:]])
    by_order = change(logits[-1], logits_of(model, reordered)[-1])
    by_config = change(logits, logits_of(build(case.model, case.config | case.unlike), tokens))
    print(f"{case.name}: order moves the last logits by {by_order:.2f}, {case.unlike} all by {by_config:.2f}")
    if by_order < 0.2 or by_config < 0.02:
        raise SystemExit(f"{case.name}: its logits depend too little on attention; raise the weights' scale")


def write_checkpoint(case: Case, directory: Path) -> None:
    """Writes the checkpoint of one case with its tokens and logits."""
    model = build(case.model, case.config)
    tokens = random_tokens(case, model.config.vocab_size)
    check_sensitivity(case, model, tokens[0, : LENGTHS[0]])
    logits = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    for row, length in enumerate(LENGTHS):
        logits[row, :length] = logits_of(model, tokens[row, :length])

    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, max_shard_size=case.max_shard_size)
    np.savez_compressed(
        directory / "golden.npz",
        tokens=tokens,
        lengths=np.array(LENGTHS, np.int32),
        logits=logits,
        torch=versions()["torch"],
        transformers=versions()["transformers"],
    )


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], float]:
    """Greedy tokens, without a stop at the end token, and the smallest lead of a winner over the second."""
    tokens, margin = list(prompt), float("inf")
    for _ in range(NEW_TOKENS):
        best = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :], margin


def continuation(directory: Path, prompt: str) -> dict[str, Any]:
    """The greedy continuation by a trained model in float32, the prompt tokenized by AutoTokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt_tokens = tokenizer(prompt)["input_ids"]
    if prompt_tokens != tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).encode(prompt).ids:
        raise SystemExit(f"{directory.name}: AutoTokenizer and tokenizer.json disagree on {prompt!r}")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokens, margin = greedy(model, prompt_tokens)
    return {
        "model": directory.name,
        "prompt": prompt,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "text": tokenizer.decode(prompt_tokens + tokens, skip_special_tokens=True),
        "smallest_margin": round(margin, 5),
        "versions": versions(),
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """JSON with one line per key, so that lists of tokens stay readable."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="directory of the golden files, tests/golden")
    parser.add_argument("--models", type=Path, help="directory that holds " + ", ".join(PROMPTS))
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # sums in one order, whatever the machine
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    for case in CASES:
        write_checkpoint(case, arguments.out / case.name)
    write_json(arguments.out / "versions.json", versions())
    if arguments.models:
        for name, prompt in PROMPTS.items():
            write_json(arguments.out / f"{name}.json", continuation(arguments.models / name, prompt))


if __name__ == "__main__":
    main()
