"""How much memory a conversion takes: peak resident set and wall time for a synthetic checkpoint.

    python -m benchmarks.convert_memory [--gigabytes 4] [--dir SCRATCH] [--json OUT]

The bound is 25 % of the checkpoint's size plus 1.5 GB. Takes three times the size on disk, and cleans up.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

LAYERS, HEAD_DIM, VOCABULARY = 32, 128, 32_000
SHARD_BYTES = 1e9
BOUND_SHARE, BOUND_BYTES = 0.25, 1.5e9

# VmHWM rather than getrusage: ru_maxrss of a child begins with what its parent had resident.
CHILD = """
import sys
from converters import convert
convert(sys.argv[1], sys.argv[2], progress=False)
status = open("/proc/self/status").read()
print(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
"""


def model(gigabytes: float) -> dict:
    """A Llama `config.json` of about this size in bfloat16, with four query heads per key/value head."""
    heads = 4 * max(1, round(4 * (gigabytes / 4) ** 0.5))
    width, kv_width = heads * HEAD_DIM, heads * HEAD_DIM // 4
    per_layer = (gigabytes * 1e9 / 2 - 2 * VOCABULARY * width) / LAYERS
    mlp_width = int((per_layer - 2 * width * width - 2 * width * kv_width) / (3 * width)) // 64 * 64
    if mlp_width < 64:
        raise SystemExit(f"--gigabytes {gigabytes:g} is too small for {LAYERS} layers; choose at least 0.5")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": HEAD_DIM,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the checkpoint."""
    width, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv_width = config["num_key_value_heads"] * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.input_layernorm.weight": (width,),
            f"model.layers.{layer}.post_attention_layernorm.weight": (width,),
            f"model.layers.{layer}.self_attn.q_proj.weight": (heads * HEAD_DIM, width),
            f"model.layers.{layer}.self_attn.k_proj.weight": (kv_width, width),
            f"model.layers.{layer}.self_attn.v_proj.weight": (kv_width, width),
            f"model.layers.{layer}.self_attn.o_proj.weight": (width, heads * HEAD_DIM),
            f"model.layers.{layer}.mlp.gate_proj.weight": (mlp, width),
            f"model.layers.{layer}.mlp.up_proj.weight": (mlp, width),
            f"model.layers.{layer}.mlp.down_proj.weight": (width, mlp),
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (VOCABULARY, width)}


def write_checkpoint(directory: Path, config: dict) -> int:
    """Writes random weights in shards of about 1 GB, one in memory at a time; returns their bytes."""
    random = np.random.default_rng(0)
    placed: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(set(placed.values())) + 1:05d}.safetensors"
        placed.update(dict.fromkeys(shard, name))
        save_file(shard, directory / name, metadata={"format": "pt"})
        shard.clear()

    for name, shape in tensor_shapes(config).items():
        values = random.standard_normal(shape, dtype=np.float32)
        shard[name] = (values * 0.02).astype(ml_dtypes.bfloat16)
        total += shard[name].nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    if shard:
        flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (directory / "config.json").write_text(json.dumps(config))
    return total


def measure(gigabytes: float, scratch: str | None) -> dict:
    """Writes, converts in a process of its own, and reports sizes in bytes and times in seconds."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        source, out = Path(directory) / "source", Path(directory) / "converted"
        source.mkdir()
        config = model(gigabytes)
        size = write_checkpoint(source, config)
        start = time.perf_counter()
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(source), str(out)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        seconds = time.perf_counter() - start
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    peak, bound = int(child.stdout) * 1024, BOUND_SHARE * size + BOUND_BYTES
    return {
        "width": config["hidden_size"],
        "mlp_width": config["intermediate_size"],
        "layers": LAYERS,
        "checkpoint_bytes": size,
        "converted_bytes": written,
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "bound_bytes": int(bound),
        "within_bound": peak <= bound,
    }


def main() -> int:
    """Command line; exit status 1 if the bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint, in 1e9 bytes")
    parser.add_argument("--dir", default=None, help="where to write it (default: the system's temporary files)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result to this file")
    arguments = parser.parse_args()
    result = measure(arguments.gigabytes, arguments.dir)
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["within_bound"] else 1


if __name__ == "__main__":
    sys.exit(main())
