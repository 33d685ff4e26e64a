"""`make demo`: completes some Python with the model that ships with the package, once per cache method.

The same prompt and the same seed for all, so that what differs is the cache.
"""

import argparse
import inspect
import textwrap

import jax
from rich.table import Table

import xquant_jax as xq
from xquant_jax.cli import terminal
from xquant_jax.numerics.packing import BLOCK

SAMPLING = xq.Sampling(temperature=0.6, top_p=0.9, repetition_penalty=1.1)
METHODS = ("bf16", "int8", "xquant:4", "xquant:2")
PROMPT = textwrap.dedent(inspect.getsource(textwrap.TextWrapper._wrap_chunks))[:1200]
TASK = '''

class Queue:
    """Keeps items in the order in which they came."""

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self.items = []

    def put(self, item):
        if self.full():
            raise Full
        self.items.append(item)

    def get(self):'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument(
        "--cache", nargs="+", default=METHODS, help="cache methods to compare; the first is the measure"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console = terminal.console()
    model = xq.load("demo")
    c = model.config
    console.print(
        f"demo model: {c.num_layers} layers, width {c.width}, {c.num_heads} query heads on {c.num_kv_heads} "
        f"key/value heads, trained on Python's standard library; device: {jax.devices()[0].platform}\n"
    )
    prompt = PROMPT + TASK
    length = len(model.tokenizer.encode(PROMPT)) if model.tokenizer else 0
    table = Table("cache", "tokens/s", "bytes per token", "of bf16", "allocated", title="the same prompt, four caches")
    baseline = None
    console.print(f"... {length} tokens of the standard library, then:", style="dim")
    terminal.write(console, TASK.strip("\n"), style="dim")
    for spec in arguments.cache:
        result = xq.generate(
            model, prompt, cache=spec, max_new_tokens=arguments.max_new_tokens, sampling=SAMPLING, seed=arguments.seed
        )
        answer = result.results[0]
        console.rule(spec, align="left")
        terminal.write(console, answer.text)
        per_token = history_bytes_per_token(model, spec)
        baseline = baseline or per_token
        table.add_row(
            spec,
            f"{(len(answer.tokens) - 1) / result.decode_s:,.0f}",
            f"{per_token:,.0f}",
            f"{per_token / baseline:.0%}",
            f"{result.cache_bytes.total / 1024:,.0f} KiB",
        )
    console.print(table)
    console.print(
        f"bytes per token: of all {c.num_layers} layers, once {BLOCK} tokens are quantized; "
        "allocated: with the window of the newest tokens in bfloat16."
    )


def history_bytes_per_token(model: xq.Model, spec: str) -> float:
    """Bytes of codes and scales that one more token costs, from what is really allocated."""
    sizes = [
        xq.cache_bytes(
            jax.eval_shape(lambda n=n: xq.allocate(xq.CacheConfig.parse(spec), model.config, batch=1, tokens=n))
        )
        for n in (1024, 2048)
    ]
    return (sizes[1].total - sizes[0].total) / 1024


if __name__ == "__main__":
    main()
