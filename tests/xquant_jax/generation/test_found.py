"""Blocks that an engine finds again: where they are written."""

import numpy as np

import xquant_jax as xq
from tests.conftest import tiny_config
from tests.xquant_jax.generation.conftest import EXACT, tiny_model
from xquant_jax.generation.engine import Engine
from xquant_jax.generation.request import CheckedRequest, Options
from xquant_jax.generation.runner import Arrival
from xquant_jax.generation.sharing import Sharing


def test_no_two_blocks_are_written_to_one_place_by_one_program(demo: xq.Model) -> None:
    """Three prompts of two blocks each come at once to a store of two: which of several writes to one place stays is
    not said, and the store takes it for the last."""
    model = tiny_model(demo, tiny_config())
    engine = Engine(model, Options(EXACT, 128), slots=3, tokens=300, sharing=Sharing(found=2))
    arrivals = [Arrival([CheckedRequest("", [1 + i] * 260)], [i]) for i in range(3)]
    save = engine._runner._places(arrivals).save
    assert np.sort(save[save < 2]).tolist() == [0, 1]
    assert (save[2, :2] < 2).all()
