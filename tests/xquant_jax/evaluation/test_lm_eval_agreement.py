"""What the samples that lm-evaluation-harness logs say of two runs; needs no harness."""

import pytest

from xquant_jax.evaluation.lm_eval_agreement import agreement, answers


def test_agreement_is_of_texts_choices_and_likeliest_continuations() -> None:
    def logged(*responses: list) -> list[dict]:
        numbered = [{"doc_id": i, "filtered_resps": own} for i, own in enumerate(responses)]
        return numbered[::-1]  # in whatever order

    reference = {
        "texts": logged(["abcd"], [""], ["x"]),
        "choices": logged([(-1.0, True), (-3.0, False)], [(-2.0, False), (-1.0, False)]),
        "continuations": logged([(-1.0, True)], [(-3.0, False)]),
        "rolling": logged([-7.0], [-8.0]),
        "repeated": logged([["a", "b"]], [["c", "d"]]),
    }
    other = {
        "texts": logged(["abxx"], [""], [""]),
        "choices": logged([(-9.0, False), (-3.0, False)], [(-2.0, False), (-1.0, False)]),
        "continuations": logged([(-1.5, True)], [(-2.0, False)]),
        "rolling": logged([-7.5], [-8.0]),
        "repeated": logged([["a", "b"]], [["c", "e"]]),
    }
    assert agreement(answers(other), answers(reference)) == {
        "texts": {"same_answer": pytest.approx(1 / 3), "same_text": pytest.approx(0.5)},
        "choices": {"same_answer": 0.5},
        "continuations": {"same_answer": 1.0},
    }
