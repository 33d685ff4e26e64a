"""Speculative decoding on a real text: acceptance, tokens a step, and time against plain decoding, in turn.

    python -m benchmarks.speculation DIR TEXT --context 8192 --tokens 128 --cache xquant:4 \
        --speculate window:4 --rounds 3 [--edit OLD=NEW] [--json OUT]

The prompt is the beginning of a text; with --edit it is a text, the wish to have it again with a word renamed, and the
beginning of that. One process decodes with and without drafts in turn; tokens are compared.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import xquant_jax as xq


def prompts_of(model: xq.Model, text: str, context: int, edit: str | None, count: int) -> list[list[int]]:
    """Pieces of `context` tokens of the text, or the beginning of an edit of it."""
    assert model.tokenizer is not None
    if edit is None:
        ids = model.tokenizer.encode(text, special_tokens=False)
        return [ids[start : start + context] for start in range(0, count * context, context)]
    old, new = edit.split("=")
    ids = model.tokenizer.encode(text, special_tokens=False)[: context - 64]
    text = model.tokenizer.backend.decode(ids)
    renamed = text.replace(old, new)
    asked = f"{text}\n\n# The same code, with {old} renamed to {new}:\n\n{renamed[: len(renamed) // 8]}"
    return [model.tokenizer.encode(asked, special_tokens=False)]


def measured(
    model: xq.Model, prompts: list[list[int]], options: dict[str, Any], speculate: str | None
) -> tuple[Any, float]:
    """A generation, and how long a token of each answer took to decode, in milliseconds."""
    generation = xq.generate(model, prompts, **options, speculate=speculate)
    tokens = len(generation.results[0].tokens) - 1  # the first one is made by prefill
    return generation, generation.decode_s / tokens * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=1, help="pieces of the text, one after another")
    parser.add_argument("--cache", default="xquant:4")
    parser.add_argument("--speculate", nargs="+", default=["window:4"])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--edit", metavar="OLD=NEW")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = xq.load(arguments.model)
    prompts = prompts_of(model, arguments.text.read_text(), arguments.context, arguments.edit, arguments.prompts)
    options: dict[str, Any] = {
        "cache": arguments.cache,
        "max_new_tokens": arguments.tokens,
        "sampling": xq.Sampling(temperature=arguments.temperature),
        "seed": 0,
        "stop_ids": [],
    }
    times: dict[str | None, list[float]] = {spec: [] for spec in (None, *arguments.speculate)}
    drafted, differ, plain = {}, {}, None
    for _ in range(arguments.rounds):
        for spec in times:
            start = time.perf_counter()
            generation, ms = measured(model, prompts, options, spec)
            times[spec].append(ms)
            tokens = [result.tokens for result in generation.results]
            plain = plain or tokens
            drafted[spec] = generation.speculation
            differ[spec] = sum(one != other for one, other in zip(tokens, plain, strict=True))
            print(f"{spec}: {ms:.1f} ms a token ({time.perf_counter() - start:.0f} s in all)", flush=True)
    rows = []
    for spec in arguments.speculate:
        of = drafted[spec]
        ratios = [base / own for base, own in zip(times[None], times[spec], strict=True)]
        row = {
            "speculate": spec,
            "prompt_tokens": sum(map(len, prompts)),
            "tokens": sum(map(len, plain or [])),
            "steps": of.steps,
            "acceptance": of.acceptance,
            "tokens_a_step": (of.steps + of.accepted) / of.steps,
            "accepted_a_step": of.accepted / of.steps,
            "faster": statistics.median(ratios),
            "answers_that_differ": differ[spec],
        }
        rows.append(row)
        print(
            f"{arguments.cache} {spec} at {len(prompts[0])} tokens: {of.acceptance:.2f} of drafted tokens accepted, "
            f"{row['accepted_a_step']:.2f} accepted a step, {row['faster']:.2f} times as fast "
            f"({', '.join(f'{r:.2f}' for r in ratios)}), {differ[spec]} of {len(prompts)} answers differ from those "
            f"without, of {row['tokens']} tokens"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
