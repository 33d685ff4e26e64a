"""`xquant lm-eval MODEL --tasks ... --cache A B`: tasks of lm-evaluation-harness, through cache methods."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from xquant_jax.cache.config import CacheConfig
from xquant_jax.cli import terminal
from xquant_jax.cli.options import MODEL
from xquant_jax.cli.progress import reported
from xquant_jax.errors import ConfigError
from xquant_jax.evaluation.scoring import PROTOCOLS
from xquant_jax.json_file import check_folder, write_json
from xquant_jax.model.loading import DEMO, DTYPES

UNKNOWN = -1
"""What tasks of RULER report for a length that they have no documents of."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "lm-eval",
        help="run tasks of lm-evaluation-harness",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names of tasks, or their YAML files")
    parser.add_argument("--cache", nargs="+", required=True, metavar="SPEC", help="name[:bits][,option=value...]")
    parser.add_argument(
        "--metadata",
        type=json.loads,
        default={},
        metavar="JSON",
        help="what tasks that generate their documents are told, as in the harness: for RULER the lengths, "
        """'{"max_seq_lengths": [4096]}'; the tokenizer is the model's unless it says another""",
    )
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with tasks of your own")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="paper", help="of likelihoods, as in xquant eval")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question (default: the task's own)")
    parser.add_argument(
        "--apply-chat-template",
        nargs="?",
        const=True,
        default=False,
        metavar="NAME",
        help="ask in the form of the model's chat template, of the one with this name if it has several",
    )
    parser.add_argument("--system-instruction", metavar="TEXT", help="stands before every question")
    parser.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        help="examples as turns of the conversation (default: with a chat template), or all in one message",
    )
    parser.add_argument(
        "--gen-kwargs",
        nargs="+",
        metavar="NAME=VALUE",
        help="how texts are generated, over what tasks say: do_sample=true temperature=0.7 max_gen_toks=64, or JSON",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is sampled; examples are those of the harness")
    parser.add_argument("--limit", type=int, help="documents of each task (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at once")
    parser.add_argument("--max-length", type=int, help="tokens of context and answer (default: what the model allows)")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and activations (default: the checkpoint's)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="of xquant calibrate (default: the model's)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results to this file, as they come")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("lm-eval needs lm-evaluation-harness; install: pip install 'xquant-jax[lm-eval]'") from None
    from xquant_jax.evaluation.lm_eval import XQuantLM
    from xquant_jax.evaluation.lm_eval_agreement import Answers, agreement, answers

    check_folder("--json", arguments.json)
    for spec in arguments.cache:
        CacheConfig.parse(spec)
    if not isinstance(arguments.metadata, dict):
        raise ConfigError(f'--metadata {json.dumps(arguments.metadata)} is no JSON object; write {{"name": value}}')
    if arguments.fewshot_as_multiturn and not arguments.apply_chat_template:
        raise ConfigError("--fewshot-as-multiturn is about conversations; use it with --apply-chat-template")
    asked = {
        "apply_chat_template": arguments.apply_chat_template,
        "system_instruction": arguments.system_instruction,
        "fewshot_as_multiturn": bool(arguments.apply_chat_template) and arguments.fewshot_as_multiturn is not False,
        "gen_kwargs": _generation_options(arguments.gen_kwargs or []),
    }
    metadata = {"tokenizer": str(DEMO if arguments.model == "demo" else arguments.model)} | arguments.metadata
    folder = str(arguments.include_path) if arguments.include_path else None
    tasks = TaskManager(include_path=folder, metadata=metadata)
    unknown = [task for task in arguments.tasks if not tasks.match_tasks([task]) and not Path(task).is_file()]
    if unknown:
        raise ConfigError(f"there is no task {', '.join(unknown)}; name tasks of the harness or use --include-path")
    rows: list[dict[str, Any]] = []
    reference: Answers = {}
    for spec in arguments.cache:
        make: Any = XQuantLM  # the harness' decorator hides its signature
        with reported() as report:
            model = make(
                arguments.model,
                spec,
                arguments.protocol,
                arguments.dtype,
                batch_size=arguments.batch_size,
                max_length=arguments.max_length,
                calibration=str(arguments.calibration) if arguments.calibration else None,
                seed=arguments.seed,
                report=lambda done, total, kind, spec=spec: report(done, total, f"{spec}: {kind}"),
            )
            model.chat_template(arguments.apply_chat_template)  # chooses it; the harness would not say which
            try:
                outcome: Any = simple_evaluate(
                    model=model,
                    tasks=arguments.tasks,
                    num_fewshot=arguments.num_fewshot,
                    limit=arguments.limit,
                    task_manager=tasks,
                    metadata=metadata,
                    log_samples=len(arguments.cache) > 1,
                    **asked,
                )
            except ImportError as error:
                raise ConfigError(
                    f"a task needs a package that is not installed ({error}); those of RULER come with "
                    f"pip install 'xquant-jax[ruler]'"
                ) from error
        found = answers(outcome.get("samples", {}))
        reference = reference or found
        rows.append({"cache": spec, "results": outcome["results"], "agreement": agreement(found, reference)})
        if arguments.json:
            document = {"model": arguments.model, "protocol": arguments.protocol, "seed": arguments.seed, **asked}
            document["rows"] = rows
            write_json(arguments.json, document)
    show(terminal.console(), rows)


def _generation_options(words: list[str]) -> dict[str, Any]:
    """The harness' own reading of its option: a JSON object, or pairs `name=value` set apart by spaces or commas."""
    if not words:
        return {}
    from lm_eval._cli.utils import key_val_to_dict, try_parse_json

    try:
        whole = try_parse_json(words[0])
        parts = [whole] if isinstance(whole, dict) and len(words) == 1 else [key_val_to_dict(word) for word in words]
    except ValueError as error:
        raise ConfigError(f"--gen-kwargs {' '.join(words)} cannot be read: {error}") from error
    return {name: value for part in parts for name, value in part.items()}


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """A line per metric, a column per cache."""
    table = Table("task", "metric", *(row["cache"] for row in rows))
    for task, metrics in rows[0]["results"].items():
        for name, value in metrics.items():
            metric = name.removesuffix(",none")
            if not isinstance(value, int | float) or "stderr" in metric or metric == "sample_len" or value == UNKNOWN:
                continue
            table.add_row(task, metric, *(_with_error(row["results"][task], name) for row in rows))
        for what in rows[0]["agreement"].get(task, {}):
            table.add_row(task, what.replace("_", " "), *(f"{row['agreement'][task][what]:.4f}" for row in rows))
    console.print(table)
    if rows[0]["agreement"]:
        console.print(
            f"same answer: share of documents that are answered as through {rows[0]['cache']}; same text: mean share of"
            " a generated answer's text before it differs from that one",
            style="dim",
        )


def _with_error(metrics: dict[str, Any], name: str) -> str:
    metric, _, kind = name.partition(",")
    error = metrics.get(f"{metric}_stderr,{kind}")
    return f"{metrics[name]:.4f}" + (f" ± {error:.4f}" if isinstance(error, int | float) else "")
