"""Writes docs/accuracy.md from docs/accuracy/summary.md and the results of `xquant eval ... --json` beside it.

python -m benchmarks.accuracy_page
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from converters import open_checkpoint
from xquant_jax.cache.config import CacheConfig
from xquant_jax.config import ModelConfig
from xquant_jax.evaluation.evaluate import allocated

DOCS = Path(__file__).parents[1] / "docs"
MODULES = "$LIB/argparse.py $LIB/inspect.py $LIB/subprocess.py $LIB/tarfile.py $LIB/typing.py"
LIBRARY = "LIB=$(python -c 'import os; print(os.path.dirname(os.__file__))')"
MODELS = {  # what it is, and the text that its calibration was found on
    "pystdlib-mha": (
        "12 layers, a key/value head per query head (K = H), trained on Python's standard library",
        MODULES,
    ),
    "pystdlib-gqa": ("12 layers, 6 query heads on 2 key/value heads, trained on Python's standard library", MODULES),
    "demo": ("the model that ships with the package: 12 layers, 4 query heads on 2 key/value heads", MODULES),
    "stories260K": ("5 layers, 8 query heads on 4 key/value heads, trained on TinyStories", "stories.txt"),
}
D, H, R, HEAD = 4096, 32, 1024, 128  # Llama-3.1-8B: width, query heads, width of keys, head dimension


def section(name: str, result: dict[str, Any]) -> str:
    """One model: how it was measured, plot and table."""
    what, text = MODELS[name]
    windows = len(result["predicted_bytes"])
    specs = " ".join(row["cache"] for row in result["rows"])
    learned = " ".join(sorted({learn for row in result["rows"] if (learn := learned_by(row["cache"]))}))
    lines = [
        f"## {name}",
        "",
        f"{what}. {windows} windows of {result['seq_len']} tokens, perplexity without a cache "
        f"{result['baseline']['perplexity']:.4f}.",
        "",
        f"    {LIBRARY if text == MODULES else 'tail -c 200000 ../shared/data/tinystories_val.txt > stories.txt'}",
        f"    xquant calibrate {result['model']} --text {text} --out {name}.safetensors --cache {learned}",
        f"    xquant eval {result['model']} --text {result['text']} --seq-len {result['seq_len']} "
        f"--limit-windows {windows} --calibration {name}.safetensors --cache {specs}",
        "",
        f"![perplexity against size](accuracy/{name}.png)",
        "",
        "| cache | size | real size | perplexity | over 16 bit, 1/1000 nat |",
        "|---|---|---|---|---|",
    ]
    config = open_checkpoint(checkpoint(result["model"])).model_config
    lines += [
        f"| `{row['cache']}` | {row['paper_ratio']:.1%} | {real_size(row['cache'], config):.1%} "
        f"| {row['perplexity']:.4f} | {1000 * row['delta_nll']:.1f} ± {1000 * row['stderr']:.1f} |"
        for row in sorted(result["rows"], key=lambda row: (row["paper_ratio"], row["perplexity"]), reverse=True)
    ]
    return "\n".join(lines) + "\n"


def checkpoint(model: str) -> Path:
    """Where the model lies."""
    return Path(__file__).parents[1] / ("xquant_jax/demo" if model == "demo" else model)


def real_size(cache: str, config: ModelConfig) -> float:
    """Bytes that a long context's next token takes, scratch included, relative to keys and values of 16 bits."""
    spec = CacheConfig.parse(cache)
    short, long = (allocated(spec, config, tokens).total for tokens in (8192, 16384))
    return (long - short) / 8192 / (config.num_layers * 4 * config.kv_width)


def learned_by(cache: str) -> str:
    """The cache without what calibration does not depend on."""
    keep = [part for part in cache.split(",") if not part.startswith(("first=", "accumulator="))]
    return ",".join(keep) if cache.startswith("kvquant") or "rank=" in cache else ""


def variants(results: dict[str, dict[str, Any]]) -> str:
    """The options of xquant-cl: accuracy at 2 and 3 bits against the default, then operations and scratch."""
    names = list(results)
    columns = [(name, bits) for name in names for bits in (2, 3)]
    options = list(dict.fromkeys(relative(row["cache"], name) for name in names for row in results[name]["rows"]))
    lines = [
        "## The options of xquant-cl",
        "",
        "Increase over 16 bit in 1/1000 nat at 2 and at 3 bits; in brackets the difference to the default in the first "
        "row, with the paired standard error over windows. Operations per cached token and layer in decode (values "
        "absorbed) and scratch bytes per cached token of the running sum: by formula, for Llama-3.1-8B.",
        "",
    ]
    for name in names:
        what = results[name]
        specs = " ".join(row["cache"] for row in what["rows"])
        lines += [
            f"    xquant eval {what['model']} --text {what['text']} --seq-len {what['seq_len']} "
            f"--limit-windows {len(what['predicted_bytes'])} --calibration {name}.safetensors --cache {specs}",
        ]
    lines += [
        "",
        "| options | " + " | ".join(f"{name}, {bits}" for name, bits in columns) + " | MFLOP | scratch |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for option in options:
        cells = [cell(results[name], option, bits, name) for name, bits in columns]
        lines.append(f"| {f'`{option}`' if option else 'default'} | " + " | ".join(cells) + f" | {cost(option)} |")
    return "\n".join(lines) + "\n"


def relative(cache: str, name: str) -> str:
    """Options of a cache, with the rank as a share of R."""
    _, _, options = cache.partition(",")
    width = {"stories260K": 32, "pystdlib-gqa": 128, "demo": 128}.get(name, 0)
    head, found, rank = options.partition("rank=")
    if not found:
        return options
    share = width // int(rank)
    return f"{head}rank={'R' if share == 1 else f'R/{share}'}"


def cell(result: dict[str, Any], option: str, bits: int, name: str) -> str:
    """Increase, and difference to the default, of one cache."""
    rows = {relative(row["cache"], name): row for row in result["rows"] if row["cache"].startswith(f"xquant-cl:{bits}")}
    if option not in rows:
        return ""
    increase = f"{1000 * rows[option]['delta_nll']:.1f}"
    return increase if not option else f"{increase} ({difference(rows[option], rows[''])})"


def difference(row: dict[str, Any], other: dict[str, Any]) -> str:
    """How much more a cache loses than another, in 1/1000 nat, with the paired standard error over windows."""
    off = 1000 * (np.asarray(row["window_nlls"]) - np.asarray(other["window_nlls"]))
    return f"{off.mean():+.1f} ± {off.std(ddof=1) / len(off) ** 0.5:.1f}"


def rebuilt(results: dict[str, dict[str, Any]]) -> str:
    """`rebuild_dtype`: what rounding the matrix that keys are rebuilt with adds."""
    lines = [
        "## Keys rebuilt in 8 bits",
        "",
        "Increase over 16 bit in 1/1000 nat with the key matrix as it is, and what `rebuild_dtype=` adds to it, with "
        "the paired standard error over windows. `fp8` takes codes of up to 4 bits.",
        "",
    ]
    for what in results.values():
        specs = " ".join(row["cache"] for row in what["rows"])
        lines += [
            f"    xquant eval {what['model']} --text {what['text']} --seq-len {what['seq_len']} "
            f"--limit-windows {len(what['predicted_bytes'])} --cache {specs}",
        ]
    lines += ["", "| model | cache | bf16 | int8 | fp8 |", "|---" * 5 + "|"]
    for name, what in results.items():
        rows = {row["cache"]: row for row in what["rows"]}
        for cache, row in rows.items():
            if "rebuild_dtype" in cache:
                continue
            small = {dtype: rows.get(f"{cache},rebuild_dtype={dtype}") for dtype in ("int8", "fp8")}
            cells = [difference(other, row) if other else "" for other in small.values()]
            lines.append(f"| {name} | `{cache}` | {1000 * row['delta_nll']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cost(option: str) -> str:
    """MFLOP per cached token and layer, and scratch bytes per cached token."""
    if option in ("accumulator=bf16", "input=post_norm", "input=residual"):
        return "K = H | "
    latent, per_head = "predict=paper" not in option, "per_head" in option
    width = 2 * R if latent else D
    rank = R // int(option.partition("rank=R/")[2] or 1) if "rank" in option else 0
    of_latent = 4 * width * rank if rank else 2 * width * width
    predict = of_latent if latent else 2 * 2 * R * D
    keys = 2 * R * HEAD if per_head else 2 * width * R
    values = 2 * H * (HEAD if per_head else width)
    scratch = 2 * width if "accumulator=bf16" in option else width + width // 128 * 4
    return f"{(predict + keys + values) / 1e6:.1f} | {scratch:,}"


def main() -> None:
    def read(name: str) -> dict[str, Any]:
        return json.loads((DOCS / "accuracy" / f"{name}.json").read_text(encoding="utf-8"))

    summary = (DOCS / "accuracy" / "summary.md").read_text(encoding="utf-8")
    parts = [section(name, read(name)) for name in MODELS]
    compared = variants({name: read(f"{name}-cl") for name in ("pystdlib-gqa", "demo", "stories260K", "pystdlib-mha")})
    small = rebuilt({name: read(f"{name}-rebuild") for name in ("pystdlib-mha", "pystdlib-gqa", "demo", "stories260K")})
    (DOCS / "accuracy.md").write_text("\n".join([summary, compared, small, *parts]), encoding="utf-8")


if __name__ == "__main__":
    main()
