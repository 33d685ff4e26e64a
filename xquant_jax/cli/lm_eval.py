"""`xquant lm-eval MODEL --tasks ... --cache A B`: tasks of lm-evaluation-harness, through cache methods."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from xquant_jax.cache.config import CacheConfig
from xquant_jax.cli import terminal
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
    parser.add_argument("model", metavar="MODEL", help='converted or Hugging Face directory, or "demo"')
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
    from xquant_jax.evaluation.lm_eval import Answers, XQuantLM, agreement, answers

    check_folder("--json", arguments.json)
    for spec in arguments.cache:
        CacheConfig.parse(spec)
    if not isinstance(arguments.metadata, dict):
        raise ConfigError(f'--metadata {json.dumps(arguments.metadata)} is no JSON object; write {{"name": value}}')
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
                report=lambda done, total, kind, spec=spec: report(done, total, f"{spec}: {kind}"),
            )
            try:
                outcome: Any = simple_evaluate(
                    model=model,
                    tasks=arguments.tasks,
                    num_fewshot=arguments.num_fewshot,
                    limit=arguments.limit,
                    task_manager=tasks,
                    metadata=metadata,
                    log_samples=len(arguments.cache) > 1,
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
            document = {"model": arguments.model, "protocol": arguments.protocol, "rows": rows}
            write_json(arguments.json, document)
    show(terminal.console(), rows)


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
