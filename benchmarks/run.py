"""`make benchmark`: runs the benchmarks and writes their figures to benchmarks/results and docs/benchmarks.md.

    python -m benchmarks.run [generation] [convert] [versus --other PYTHON]

Without names all are run; `versus` only where a Python with torch is given. Benchmarks that are not run keep the
figures of their last run.
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


def generation_section(result: dict[str, Any]) -> str:
    lengths = [key for key in result["decode_ms"][0] if key != "cache"]
    return f"""## Compiling and decoding

    python -m benchmarks.generation

jax {result["jax"]}, device {result["device"]}, the demo model's width in float32, batch 1. Medians in one process.

Compile time of prefill and decode together, 8 against 32 layers of the same width (target: ratio at most 1.3):

{table(result["compile"], {"cache": "{}", "layers_8_s": "{:.2f}", "layers_32_s": "{:.2f}", "ratio": "{:.2f}"})}

Programs that XLA compiles for two prompts of the same bucket, one after the other:

{table(result["second_call"], {"prompt": "`{}`", "programs": "{}", "seconds": "{:.2f}"})}

Milliseconds per decoded token, by tokens in the cache (random contents):

{table(result["decode_ms"], {"cache": "{}", **dict.fromkeys(lengths, "{:.2f}")})}
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


SECTIONS = {"generation": generation_section, "convert": convert_section, "versus": versus_section}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--other", help="a Python with torch and transformers, for versus")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(SECTIONS):
        parser.error(f"{', '.join(unknown)} is not one of {', '.join(SECTIONS)}")
    names = arguments.names or [name for name in SECTIONS if name != "versus" or arguments.other]
    RESULTS.mkdir(exist_ok=True)
    commands = {
        "generation": ["generation"],
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
