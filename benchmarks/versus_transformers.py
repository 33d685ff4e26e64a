"""Decoding a model here and with Hugging Face transformers, in turn, on the same two cores.

    python -m benchmarks.versus_transformers --other .venv-golden/bin/python [--model DIR] [--json OUT]

Every figure is a fresh process that warms up, then decodes greedily from random prompts; pairs run one after the
other and the ratio is taken pair by pair, so that a machine whose speed drifts does not decide. `--other` is a Python
with torch, transformers, optimum-quanto and hqq. Float32 on both sides.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAIRS = (
    ("bf16", ["--cache", "dynamic"]),
    ("xquant:4", ["--cache", "quantized", "--backend", "hqq", "--nbits", "4"]),
    ("xquant:4", ["--cache", "quantized", "--backend", "hqq", "--nbits", "8"]),
    ("xquant:4", ["--cache", "quantized", "--backend", "quanto", "--nbits", "4"]),
)
OURS = """
import json, statistics, sys
import numpy as np
import xquant_jax as xq
folder, spec, prompt_tokens, new_tokens, repeats = *sys.argv[1:3], *map(int, sys.argv[3:])
model = xq.load(folder, dtype="float32")
prompt = np.random.default_rng(0).integers(1, model.config.vocab_size, prompt_tokens).tolist()
runs = [xq.generate(model, [prompt], cache=spec, max_new_tokens=new_tokens, stop_ids=[]) for _ in range(repeats + 1)]
decode = statistics.median((new_tokens - 1) / run.decode_s for run in runs[1:])
print(json.dumps({"decode_tokens_per_s": decode, "prefill_s": statistics.median(r.prefill_s for r in runs[1:])}))
"""


def run(command: list[str]) -> dict[str, Any]:
    """The last JSON object that a process prints."""
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE.parent, env=os.environ)
    return json.loads(done.stdout[done.stdout.index("{") :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", required=True, help="a Python with torch and transformers")
    parser.add_argument("--model", default=str(files("xquant_jax") / "demo"), help="a directory (default: the demo)")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    lengths = ["--prompt-tokens", str(arguments.prompt_tokens), "--new-tokens", str(arguments.new_tokens)]
    theirs_script = [arguments.other, str(HERE / "transformers_decode.py"), arguments.model, *lengths]
    rows = []
    for spec, options in PAIRS:
        pairs = []
        for _ in range(arguments.rounds):
            sizes = [str(n) for n in (arguments.prompt_tokens, arguments.new_tokens, arguments.repeats)]
            ours = run([sys.executable, "-c", OURS, arguments.model, spec, *sizes])
            theirs = run([*theirs_script, *options, "--repeats", str(arguments.repeats), "--threads", "2"])
            pairs.append((ours["decode_tokens_per_s"], theirs["decode_tokens_per_second"]))
        rows.append(
            {
                "ours": spec,
                "transformers": " ".join(options[1:]).replace("--", ""),
                "ours_tokens_per_s": statistics.median(a for a, _ in pairs),
                "transformers_tokens_per_s": statistics.median(b for _, b in pairs),
                "ratio": statistics.median(a / b for a, b in pairs),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        sizes = {name: getattr(arguments, name) for name in ("prompt_tokens", "new_tokens", "rounds", "repeats")}
        arguments.json.write_text(json.dumps({"rows": rows, **sizes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
