"""Drafts on a mesh of eight (simulated) devices: the same answers as without, where blocks and heads are spread."""

from pathlib import Path

import jax
import numpy as np
import pytest

import xquant_jax as xq
from tests.checkpoints import write_checkpoint
from tests.conftest import random_tokens
from xquant_jax.generation.answer import Drafted
from xquant_jax.generation.generate import generate_requests
from xquant_jax.generation.request import Options, Request


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "speculate"),
    [
        ("xquant-cl:2,first=1@4,predict=latent,sink=0", "window:3,blocks=1"),  # blocks are split in four
        ("kivi:2,group=8,rope=post", "lookup:4,min=1"),  # blocks in two, and heads
    ],
)
def test_answers_are_those_without_drafts(tmp_path: Path, cache: str, speculate: str) -> None:
    """Prompts of up to seven blocks, some of which drafts leave out; three answers cross a block."""
    if jax.device_count() < 8:
        pytest.skip(f"{jax.device_count()} {jax.default_backend()} devices; this test simulates eight on CPU")
    model = xq.load(write_checkpoint(tmp_path), mesh=xq.make_mesh(2, 2, 2))
    requests = [
        Request(random_tokens(model.config, length, seed=length).tolist(), 12, stop_ids=[], speculate=speculate)
        for speculate in (True, False)
        for length in (5, 120, 250, 893)
    ]
    results = generate_requests(model, requests, Options(cache, 256, speculate=speculate)).results
    for found, expected in zip(results[:4], results[4:], strict=True):
        assert found.tokens == expected.tokens
        np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)
        assert expected.speculation == Drafted(11, 0, 0)
    assert sum(result.speculation.accepted for result in results[:4] if result.speculation) > 4
