"""`make benchmark`: runs the benchmarks and writes their figures to benchmarks/results and docs/benchmarks.md.

    python -m benchmarks.run [generation] [real prefix --model DIR] [convert] [versus --other PYTHON]

Without names all are run; `real` and `prefix` only where a model is given, `versus` where a Python with torch is.
Benchmarks that are not run keep the figures of their last run.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "benchmarks.md"


def table(rows: list[dict[str, Any]], formats: dict[str, str]) -> str:
    """A Markdown table of these columns, each with its format."""
    lines = ["| " + " | ".join(formats) + " |", "|" + "---|" * len(formats)]
    lines += ["| " + " | ".join(form.format(row[key]) for key, form in formats.items()) + " |" for row in rows]
    return "\n".join(lines)


def decode_table(rows: list[dict[str, Any]]) -> str:
    """Decoding by tokens in the cache, and prefill."""
    lengths = [key for key in rows[0] if key.isdigit()]
    return f"""Milliseconds per decoded token, by tokens in the cache (random contents), and seconds to feed a prompt of
1024 tokens; medians, the caches in turn:

{table(rows, {"cache": "{}", **dict.fromkeys(lengths, "{:.1f}"), "prefill_s": "{:.2f}"})}"""


def generation_section(result: dict[str, Any]) -> str:
    return f"""## Compiling and decoding

    python -m benchmarks.generation

jax {result["jax"]}, device {result["device"]}, the demo model's width in float32, batch 1. Medians in one process.

Compile time of prefill and decode together, 8 against 32 layers of the same width (target: ratio at most 1.3):

{table(result["compile"], {"cache": "{}", "layers_8_s": "{:.2f}", "layers_32_s": "{:.2f}", "ratio": "{:.2f}"})}

Programs that XLA compiles for two prompts of the same bucket, one after the other:

{table(result["second_call"], {"prompt": "`{}`", "programs": "{}", "seconds": "{:.2f}"})}

{decode_table(result["decode_ms"])}
"""


def real_section(result: dict[str, Any]) -> str:
    rows = result["decode_ms"]
    base = rows[0]
    lengths = [key for key in base if key.isdigit()]
    relative = [
        {"cache": row["cache"], **{key: base[key] / row[key] for key in (*lengths, "prefill_s")}} for row in rows[1:]
    ]
    return f"""## A real model

    python -m benchmarks.run real --model {result["model"]}

jax {result["jax"]}, device {result["device"]}, {result["model"]} in float32, batch 1.

{decode_table(rows)}

Speed relative to `{base["cache"]}`:

{table(relative, {"cache": "{}", **dict.fromkeys((*lengths, "prefill_s"), "{:.2f}")})}
"""


def prefix_section(result: dict[str, Any]) -> str:
    columns = {"cache": "{}", "tokens": "{}", "stored": "{}", "megabytes": "{:.1f}"}
    columns |= dict.fromkeys(("whole_s", "load_s", "prefix_s"), "{:.2f}")
    columns |= dict.fromkeys(("share", "share_with_load"), "{:.3f}")
    return f"""## A saved prefix

    python -m benchmarks.run prefix --model {result["model"]}

jax {result["jax"]}, device {result["device"]}, {result["model"]} in {result["dtype"]}, batch 1. Seconds to the first
token of a prompt of random tokens: fed whole, and from a saved prefix with 64 tokens behind it, without compiling;
medians of {result["rounds"]} pairs. `share` is of the whole prompt's time.

{table([result], columns)}
"""


def convert_section(result: dict[str, Any]) -> str:
    size, written, peak, bound = (
        result[f"{name}_bytes"] / 1e9 for name in ("checkpoint", "converted", "peak", "bound")
    )
    return f"""## Memory of the conversion

    python -m benchmarks.convert_memory

A synthetic checkpoint of {size:.2f} GB in {result["layers"]} layers (width {result["width"]}), converted with all SVD
factors in a process of its own: peak resident memory **{peak:.2f} GB**, the bound being {bound:.2f} GB (25 % of the
checkpoint plus 1.5 GB): {"held" if result["within_bound"] else "MISSED"}. It took {result["seconds"]:.0f} s and wrote
{written:.2f} GB.
"""


def versus_section(result: dict[str, Any]) -> str:
    columns = {
        "ours": "{}",
        "transformers": "{}",
        "ours_tokens_per_s": "{:.0f}",
        "transformers_tokens_per_s": "{:.0f}",
        "ratio": "{:.1f}",
    }
    return f"""## Beside Hugging Face transformers

    python -m benchmarks.versus_transformers --other PYTHON_WITH_TORCH

Decoding the demo model on the same two CPU cores, float32, {result["prompt_tokens"]} prompt and
{result["new_tokens"]} new tokens, batch 1, processes in turn; medians of {result["rounds"]} pairs. transformers runs
`generate` with its dynamic cache or a quantized one (backend and bits named). At this size much of its time goes into
dispatching operations one by one, which a compiled loop does not do; the ratio says nothing about large models.

{table(result["rows"], columns)}
"""


REAL = ("bf16", "int8", "xquant:4")
"""Caches of a real model; the first is what the others are compared with."""

SECTIONS = {
    "generation": generation_section,
    "real": real_section,
    "prefix": prefix_section,
    "convert": convert_section,
    "versus": versus_section,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--other", help="a Python with torch and transformers, for versus")
    parser.add_argument("--model", help="a directory or a name on the Hub, for real and prefix")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(SECTIONS):
        parser.error(f"{', '.join(unknown)} is not one of {', '.join(SECTIONS)}")
    given = {"versus": arguments.other, "real": arguments.model, "prefix": arguments.model}
    names = arguments.names or [name for name in SECTIONS if given.get(name, True)]
    if {"real", "prefix"} & set(names) and not arguments.model:
        parser.error("real and prefix need --model")
    RESULTS.mkdir(exist_ok=True)
    commands = {
        "generation": ["generation"],
        "real": ["generation", "--model", arguments.model, "--cache", *REAL, "--only", "decode_ms"],
        "prefix": ["prefix", "--model", arguments.model],
        "convert": ["convert_memory"],
        "versus": ["versus_transformers", "--other", arguments.other or sys.executable],
    }
    for name in names:
        module, *options = commands[name]
        out = RESULTS / f"{name}.json"
        command = [sys.executable, "-m", f"benchmarks.{module}", *options, "--json", str(out)]
        subprocess.run(command, check=True, cwd=HERE.parent)
    parts = [
        render(json.loads(f.read_text()))
        for name, render in SECTIONS.items()
        if (f := RESULTS / f"{name}.json").exists()
    ]
    head = (
        "# Benchmarks\n\nWritten by `make benchmark`; every section names its command. Two CPU cores, no accelerator.\n"
    )
    PAGE.write_text("\n".join([head, *parts]))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
