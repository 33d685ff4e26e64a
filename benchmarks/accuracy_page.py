"""Writes docs/accuracy.md from docs/accuracy/summary.md and the results of `xquant eval ... --json` beside it.

python -m benchmarks.accuracy_page
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from xquant_jax.cache.config import CacheConfig
from xquant_jax.config import ModelConfig
from xquant_jax.evaluation.evaluate import allocated
from xquant_jax.planning.plan import read_config

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "accuracy"
REAL = "SmolLM2-135M-Instruct"
MODELS = {
    REAL: "30 layers, width 576, 9 query heads on 3 key/value heads, WikiText-2: the real language model",
    "pystdlib-mha": "12 layers, a key/value head per query head (K = H), trained on Python's standard library",
    "pystdlib-gqa": "12 layers, 6 query heads on 2 key/value heads, trained on Python's standard library",
    "demo": "the model that ships with the package: 12 layers, 4 query heads on 2 key/value heads",
    "stories260K": "5 layers, 8 query heads of dimension 8 on 4 key/value heads, trained on TinyStories",
}
CALIBRATED = f"""    tail -c 600000 ../shared/data/wikitext2_test.txt > later.txt
    xquant calibrate {REAL} --text later.txt --limit-windows 16 --out {REAL}.safetensors \\
      --cache kvquant:2 kvquant:3 kvquant:4
"""
CONFIGS = {"demo": "xquant_jax/demo", REAL: "scripts/configs/smollm2-135m.json"}


def section(name: str) -> str:
    """One model: how it was measured, plot and table."""
    result = read(name)
    config = model_config(name, result)
    calibrated = name == REAL
    lines = [
        f"## {name}",
        "",
        f"{MODELS[name]}. {len(result['predicted_bytes'])} windows of {result['seq_len']} tokens, perplexity without a "
        f"cache {result['baseline']['perplexity']:.4f}.",
        "",
        *(CALIBRATED.rstrip("\n").split("\n") if calibrated else []),
        command(result, f"--calibration {name}.safetensors " if calibrated else ""),
        "",
        f"![perplexity against size](accuracy/{name}.png)",
        "",
        "| cache | | size | real size | perplexity | over 16 bit, 1/1000 nat | KL, 1/1000 nat | same top |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row['cache']}` | {kind(row['cache'])} | {row['paper_ratio']:.1%} "
        f"| {real_size(row['cache'], config):.1%} | {row['perplexity']:.4f} "
        f"| {1000 * row['delta_nll']:.1f} ± {1000 * row['stderr']:.1f} | {1000 * row['kl_divergence']:.1f} "
        f"| {row['top1_agreement']:.1%} |"
        for row in sorted(result["rows"], key=lambda row: (bits(row["cache"]), row["kl_divergence"]))
    ]
    return "\n".join(lines) + "\n"


def command(result: dict[str, Any], options: str = "") -> str:
    """What wrote the results."""
    generated = f"--generate {len(result['continuations'][0])} " if result["continuations"] else ""
    windows, specs = len(result["predicted_bytes"]), " ".join(row["cache"] for row in result["rows"])
    return (
        f"    xquant eval {result['model']} --text {result['text']} --seq-len {result['seq_len']} --limit-windows "
        f"{windows} {generated}{options}--cache {specs}"
    )


def kind(cache: str) -> str:
    """Whether a cache is as its authors published it, or has what this library adds."""
    name, _, options = cache.partition(",")
    name = name.partition(":")[0]
    if name in ("kivi", "kvquant", "int8", "fp8"):
        return "" if "sink=" in options or "clip=" in options else "as published"
    return "as published" if "rotate=false,clip=false,sink=0" in options else "default"


def bits(cache: str) -> int:
    """Of its layers but the first."""
    return int(cache.partition(",")[0].partition(":")[2] or 8)


def model_config(name: str, result: dict[str, Any]) -> ModelConfig:
    """The model's sizes."""
    return read_config(Path(__file__).parents[1] / CONFIGS.get(name, str(result["model"])))


def real_size(cache: str, config: ModelConfig) -> float:
    """Bytes that a long context's next token takes, scratch included, relative to keys and values of 16 bits."""
    spec = CacheConfig.parse(cache)
    short, long = (allocated(spec, config, tokens).total for tokens in (8192, 16384))
    return (long - short) / 8192 / (config.num_layers * 4 * config.kv_width)


def calibrated() -> str:
    """Predictions of xquant-cl from tokens drawn at random, and found on text of the same and of another kind."""
    lines = [
        "## Predictions found on text",
        "",
        "xquant-cl predicts a layer's latents from those below. Without calibration that is found on tokens drawn at "
        "random; here beside it on 16,384 tokens of later WikiText-2 and of Python. Increase over 16 bit, and KL, in "
        "1/1000 nat, of the same windows.",
        "",
    ]
    rows: dict[str, list[str]] = {}
    titles = {REAL: "random tokens", f"{REAL}-calibrated": "WikiText-2", f"{REAL}-calibrated-python": "Python"}
    texts = {"WikiText-2": ("later.txt", "wiki"), "Python": ("../shared/data/pystdlib_valid.txt", "python")}
    count = len(read(f"{REAL}-calibrated")["predicted_bytes"])
    for name, title in titles.items():
        result = read(name)
        if title in texts:
            text, file = texts[title]
            lines += [
                f"    xquant calibrate {REAL} --text {text} --limit-windows 32 --out {file}.safetensors "
                "--cache xquant-cl",
                command(result, f"--calibration {file}.safetensors "),
            ]
        exact = np.asarray(result["baseline"]["window_nlls"][:count])
        for row in result["rows"]:
            off = 1000 * (np.asarray(row["window_nlls"][:count]) - exact)
            divergence = 1000 * np.mean(row["window_kl_divergences"][:count])
            cell = f"{off.mean():.1f} ± {off.std(ddof=1) / len(off) ** 0.5:.1f}, {divergence:.1f}"
            rows.setdefault(row["cache"], []).append(cell)
    lines += ["", f"| cache | {' | '.join(titles.values())} |", "|---" * (1 + len(titles)) + "|"]
    lines += [
        f"| `{cache}` | {' | '.join([*cells, *[''] * (len(titles) - len(cells))])} |"
        for cache, cells in sorted(rows.items())
        if cache in ("xquant-cl:2", "xquant-cl:3", "xquant-cl:4")
    ]
    return "\n".join(lines) + "\n"


def continued() -> str:
    """How long caches go on as the real model does without one."""
    result = read(f"{REAL}-continued")
    length = len(result["continuations"][0])
    edges = [length * i // 4 for i in range(5)]
    stretches = [f"{a} to {b}" for a, b in itertools.pairwise(edges)]
    lines = [
        "## Long generation",
        "",
        f"The real model continues {len(result['continuations'])} windows of {result['seq_len']} tokens by {length} of "
        "its likeliest tokens, without a cache. Each cache sees window and continuation as in generation. *First*: "
        "after how many tokens its likeliest one is another for the first time, the median over windows; there its own "
        "greedy text parts. *Same*: the share of tokens at which it is the same, and of each quarter of the text. A "
        "model of this size soon repeats itself, greedily (26 to 132 different tokens in 1,000), which any cache can "
        "follow: the first quarter says most.",
        "",
        command(result, f"--calibration {REAL}.safetensors "),
        "",
        f"| cache | first | same | {' | '.join(stretches)} |",
        "|---" * (3 + len(stretches)) + "|",
    ]
    for row in [result["baseline"], *result["rows"]]:
        places = np.concatenate([np.asarray(own, int) for own in row["differing"]])
        counts = np.histogram(places, edges)[0]
        shares = 1 - counts / np.diff(edges) / len(row["differing"])
        lines.append(
            f"| `{row['cache']}` | {row['first_divergence']:g} | {row['continuation_agreement']:.1%} | "
            + " | ".join(f"{share:.1%}" for share in shares)
            + " |"
        )
    return "\n".join(lines) + "\n"


def retrieval() -> str:
    """Tasks of RULER, on the real model."""
    result = json.loads((RESULTS / f"{REAL}-ruler-1024.json").read_text(encoding="utf-8"))
    rows = result["rows"]
    specs = " ".join(row["cache"] for row in rows)
    lines = [
        "## Retrieval",
        "",
        "The six tasks of RULER that are generated from code, 1,024 tokens, 2 documents each, on the real model. "
        f"Score; in brackets how often the answer is exactly that through `{rows[0]['cache']}`, and the mean share of "
        "its text before the first difference: where the model itself fails, the score says nothing.",
        "",
        f"    xquant lm-eval {result['model']} --tasks {' '.join(rows[0]['results'])} "
        f"""--metadata '{{"max_seq_lengths": [1024]}}' --limit 2 --batch-size 2 --max-length 1152 """
        f"--dtype float32 --cache {specs}",
        "",
        f"| task | {' | '.join(f'`{row["cache"]}`' for row in rows)} |",
        "|---" * (1 + len(rows)) + "|",
    ]
    for task in rows[0]["results"]:
        cells = []
        for row in rows:
            agrees = row["agreement"][task]
            score = row["results"][task]["1024,none"]
            cells.append(f"{score:.2f} ({agrees['same_answer']:.2f}, {agrees['same_text']:.2f})")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    summary = (RESULTS / "summary.md").read_text(encoding="utf-8")
    first, *others = map(section, MODELS)
    parts = [summary, first, calibrated(), continued(), retrieval(), *others]
    (DOCS / "accuracy.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
