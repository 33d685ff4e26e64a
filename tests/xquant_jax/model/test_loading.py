"""Loading: the demo model, types, and files that contradict each other."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import xquant_jax as xq
from tests.conftest import GOLDEN
from xquant_jax.generation.request import Request, checked

MODEL = GOLDEN / "llama-llama3"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_the_demo_model_knows_python() -> None:
    """It is trained on Python, so Python is likelier than its own words in another order."""
    model = xq.load("demo")
    assert model.config.num_heads >= 2 * model.config.num_kv_heads
    assert model.config.kv_width % 128 == 0
    code = "def __init__(self, name):\n        self.name = name\n\n    def __repr__(self):\n        return"
    tokens = model.tokenizer.encode(code)
    shuffled = np.random.default_rng(0).permutation(tokens).tolist()

    def likelihood(ids: list[int]) -> float:
        logits = model.transformer.apply({"params": model.params}, jnp.asarray([ids]), method="score")
        logits = np.asarray(logits[0, :-1], np.float64)
        chosen = logits[np.arange(len(ids) - 1), ids[1:]]
        return float(np.mean(chosen - np.log(np.exp(logits).sum(-1))))

    assert likelihood(tokens) > -2.5
    assert likelihood(tokens) > likelihood(shuffled) + 3


def test_a_type_can_be_chosen() -> None:
    model = xq.load(MODEL, dtype="bfloat16")
    assert model.params["layers"]["key"]["kernel"].dtype == "bfloat16"
    with pytest.raises(xq.ConfigError, match="dtype=int8 is not supported"):
        xq.load(MODEL, dtype="int8")


def test_an_implementation_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(xq.ConfigError, match="implementation='cuda' is not available"):
        xq.load(MODEL, implementation="cuda")


def test_numbers_too_large_for_the_type_are_an_error(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(xq.CheckpointError, match=r"'up'.*'kernel'.* has values too large for float16"):
        xq.load(copy, dtype="float16")


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": 1099511627776}'])
def test_a_broken_generation_config_is_an_error(copy: Path, text: str) -> None:
    (copy / "generation_config.json").write_text(text)
    with pytest.raises(xq.CheckpointError, match=r"generation_config\.json"):
        xq.load(copy)


def test_an_error_names_the_file_that_the_stop_token_stands_in(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": -1}))
    with pytest.raises(xq.CheckpointError, match=r"/config\.json: eos_token_id=\[-1\]"):
        xq.load(copy)
    (copy / "generation_config.json").write_text('{"eos_token_id": -1}')
    with pytest.raises(xq.CheckpointError, match=r"/generation_config\.json: eos_token_id=\[-1\]"):
        xq.load(copy)


def test_tensors_of_another_type_than_the_config_says_are_cast_with_a_warning(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    with pytest.warns(xq.XQuantWarning, match=r"is float32, but config\.json says bfloat16"):
        model = xq.load(copy, dtype="bfloat16")
    assert model.params["embed"]["embedding"].dtype == "bfloat16"


def test_a_sequence_beyond_what_the_model_was_made_for_is_a_warning(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config |= {"max_position_embeddings": 24, "rope_parameters": rope, "rope_scaling": None}
    (copy / "config.json").write_text(json.dumps(config))
    model = xq.load(copy)
    assert model.positions == 24
    checked(model, Request([1] * 10, 15))  # the last token is never stored
    with pytest.warns(xq.XQuantWarning, match="more than the 24 tokens that the model was made for"):
        checked(model, Request([1] * 10, 16))
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": None}))
    assert xq.load(copy).positions is None


def test_a_rope_that_is_another_beyond_a_length_is_an_error_there_unless_it_was_told() -> None:
    model = xq.load(GOLDEN / "llama-longrope-short")
    longest = model.config.rope.longest
    assert longest is not None
    checked(model, Request([1] * 10, longest - 9))
    with pytest.raises(xq.ConfigError, match=rf"load the model with context={longest + 1} "):
        checked(model, Request([1] * 10, longest - 8))
    told = xq.load(GOLDEN / "llama-longrope-short", context=longest + 1)
    assert told.config.rope.long
    checked(told, Request([1] * 10, longest - 8))
    dynamic = xq.load(GOLDEN / "llama-dynamic")
    assert dynamic.positions == dynamic.config.rope.longest
    with pytest.raises(xq.ConfigError, match="rope_type='dynamic' is supported"):
        checked(dynamic, Request([1] * 10, dynamic.config.rope.longest or 0))
    with pytest.raises(xq.ConfigError, match="rope_type='dynamic' is supported"):
        xq.load(GOLDEN / "llama-dynamic", context=4096)
    with pytest.raises(xq.ConfigError, match="context=0 is not possible"):
        xq.load(GOLDEN / "llama-dynamic", context=0)
