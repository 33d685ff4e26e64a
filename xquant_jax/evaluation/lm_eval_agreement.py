"""How often two runs of lm-evaluation-harness answer the same, from the samples that it logs."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Answers = dict[str, list[str | bool | int]]
"""Of each task, the answer to each of its documents: a text, the number of a choice, or whether a text is the likeliest
one. Tasks that only count likelihoods have none, nor have those with several texts for a document."""


def answers(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Answers:
    """What the samples that the harness logs say, in the order of their documents."""
    found: Answers = {}
    for task, logged in samples.items():
        own = [_answer(sample["filtered_resps"]) for sample in sorted(logged, key=lambda sample: sample["doc_id"])]
        told = [answer for answer in own if answer is not None]
        if len(told) == len(own):
            found[task] = told
    return found


def _answer(responses: Sequence[Any]) -> str | bool | int | None:
    if isinstance(responses[0], str):
        return responses[0]
    if not all(isinstance(response, tuple | list) and isinstance(response[-1], bool) for response in responses):
        return None
    if len(responses) == 1:
        return bool(responses[0][1])
    return int(np.argmax([likelihood for likelihood, _ in responses]))


def agreement(own: Answers, reference: Answers) -> dict[str, dict[str, float]]:
    """Of each task, the share of documents whose answer is the reference's, and for texts the mean share of the
    reference's characters before the first that differs. Says what a score does not where the model itself fails."""
    table = {}
    for task, others in reference.items():
        pairs = list(zip(own[task], others, strict=True))
        table[task] = {"same_answer": float(np.mean([a == b for a, b in pairs]))}
        if isinstance(others[0], str):
            table[task]["same_text"] = float(np.mean([_same_text(str(a), str(b)) for a, b in pairs]))
    return table


def _same_text(own: str, reference: str) -> float:
    """The share of the reference before the first character that differs; 0 of an empty one that is not met."""
    if own == reference:
        return 1.0
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, reference, strict=False))
    return sum(1 for _ in same) / max(1, len(reference))
