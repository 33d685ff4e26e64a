"""Tensors of another type than the model's: which type that is, what is cast to it, and what is said of it."""

import warnings

import jax
import ml_dtypes
import numpy as np
import pytest

from converters.huggingface import HuggingFaceCheckpoint
from xquant_jax.errors import CheckpointError
from xquant_jax.parameters import leaves_of

QUERY, HEAD, EMBEDDING = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight"
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def open_quietly(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return HuggingFaceCheckpoint(directory)


def matrices(opened):
    """Every matrix of the model by its path."""
    trees = [opened.outer(), *(opened.layer(i) for i in range(2))]
    return [leaf for tree in trees for leaf in leaves_of(tree).values() if leaf.ndim == 2]


# ---- which type


@pytest.mark.parametrize("declared", NUMPY)
@pytest.mark.parametrize("stored", NUMPY)
def test_the_config_decides(checkpoint, tiny_config, tiny_tensors, declared, stored):
    config = tiny_config("llama", torch_dtype=declared)
    tensors = tiny_tensors(config, stored)
    opened = open_quietly(checkpoint(config, tensors))
    assert opened.model_config.dtype == declared
    assert {matrix.dtype.name for matrix in matrices(opened)} == {declared}
    expected = tensors[QUERY].astype(NUMPY[declared]).T
    assert np.array_equal(opened.layer(1)["query"]["kernel"], expected)


@pytest.mark.parametrize("absent", [{"torch_dtype": ...}, {"torch_dtype": "auto"}, {"torch_dtype": None}])
def test_without_a_word_of_the_config_the_tensors_decide(checkpoint, tiny_config, tiny_tensors, absent):
    config = tiny_config("llama", **absent)
    for dtype in NUMPY:
        opened = HuggingFaceCheckpoint(checkpoint(config, tiny_tensors(config, dtype), name=dtype))
        assert opened.model_config.dtype == dtype
    mixed = tiny_tensors(config, "bfloat16")
    mixed[QUERY] = mixed[QUERY].astype(np.float16)
    with pytest.warns(UserWarning, match=r"names no dtype .* so the model is float32; .* which is exact$"):
        opened = HuggingFaceCheckpoint(checkpoint(config, mixed))
    assert {matrix.dtype.name for matrix in matrices(opened)} == {"float32"}
    assert np.array_equal(opened.layer(1)["query"]["kernel"], mixed[QUERY].T.astype(np.float32))


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_vectors_stay_float32_only_where_all_layers_have_them_so(checkpoint, tiny_config, tiny_tensors, stored):
    config = tiny_config("llama", torch_dtype="bfloat16")
    tensors = tiny_tensors(config, "bfloat16")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(stored)
    one = "model.layers.1.input_layernorm.weight"
    tensors[one] = tensors[one].astype(stored)
    opened = open_quietly(checkpoint(config, tensors))
    assert opened.outer()["final_norm"]["scale"].dtype == ("float32" if stored == "float32" else "bfloat16")
    assert [opened.layer(i)["attention_norm"]["scale"].dtype.name for i in range(2)] == ["bfloat16"] * 2


def test_devices_get_the_same(checkpoint, tiny_config, tiny_tensors):
    config = tiny_config("llama", torch_dtype="bfloat16")
    opened = open_quietly(checkpoint(config, tiny_tensors(config, "float32")))
    mesh = jax.make_mesh((2,), ("tensor",))
    by_row, replicated = jax.NamedSharding(mesh, jax.P("tensor")), jax.NamedSharding(mesh, jax.P())
    whole = opened.layer(0)
    sharding = jax.tree.map(lambda leaf: by_row if leaf.ndim == 2 else replicated, whole)
    for path, leaf in leaves_of(opened.layer(0, sharding=sharding)).items():
        assert leaf.dtype == leaves_of(whole)[path].dtype
        assert np.array_equal(np.asarray(leaf), leaves_of(whole)[path])


# ---- what is said


def test_one_warning_names_a_tensor_both_types_and_the_loss(checkpoint, tiny_config, tiny_tensors):
    config = tiny_config("llama", torch_dtype="bfloat16")
    tensors = tiny_tensors(config, "bfloat16")
    tensors[HEAD] = tensors[HEAD].astype(np.float32)
    directory = checkpoint(config, tensors)
    with pytest.warns(UserWarning, match="cast") as caught:
        matrices(HuggingFaceCheckpoint(directory))
    assert [str(warning.message) for warning in caught] == [
        f"{directory}: lm_head.weight in model.safetensors is float32, but config.json says bfloat16; it is cast to "
        f"bfloat16, as by transformers where no other is asked for, rounded to it where bfloat16 does not hold their "
        f"values; a wider dtype in config.json keeps them"
    ]


def test_casts_to_float32_are_called_exact_and_counted(checkpoint, tiny_config, tiny_tensors):
    config = tiny_config("llama")
    with pytest.warns(UserWarning, match=r"is bfloat16, but .* says float32; it and 20 more are cast .* is exact$"):
        HuggingFaceCheckpoint(checkpoint(config, tiny_tensors(config, "bfloat16")))


# ---- what cannot be cast


def test_values_too_large_for_the_models_type(checkpoint, tiny_config, tiny_tensors):
    config = tiny_config("llama", torch_dtype="float16")
    tensors = tiny_tensors(config, "bfloat16")
    tensors[QUERY][3, 5] = 70_000
    opened = open_quietly(checkpoint(config, tensors))
    assert "query" in opened.layer(0)
    message = f"{QUERY} in model.safetensors has values that are not finite in float16: it is bfloat16, and some are"
    with pytest.raises(CheckpointError, match=message):
        opened.layer(1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_in_the_file_are_damage_whatever_the_cast(
    checkpoint, tiny_config, tiny_tensors, value
):
    config = tiny_config("llama", torch_dtype="float16")
    tensors = tiny_tensors(config, "bfloat16")
    tensors[QUERY][3, 5] = value
    opened = open_quietly(checkpoint(config, tensors))
    with pytest.raises(CheckpointError, match="has values that are not finite; the checkpoint is damaged"):
        opened.layer(1)


# ---- a head beside tied embeddings


def test_a_tied_head_is_compared_as_it_would_be_read(checkpoint, tiny_config, tiny_tensors):
    config = tiny_config("llama", tie_word_embeddings=True, torch_dtype="bfloat16")
    tensors = tiny_tensors(config, "bfloat16")
    exact = tensors[EMBEDDING].astype(np.float32)
    nearby = exact * np.float32(1.0001)  # rounds to the same bfloat16
    assert not np.array_equal(nearby, exact)
    for name, head in (("exact", exact), ("nearby", nearby)):
        with pytest.warns(UserWarning, match=r"lm_head.weight .* is float32, but config.json says bfloat16"):
            opened = HuggingFaceCheckpoint(checkpoint(config, tensors | {HEAD: head}, name=name))
        assert "head" not in opened.outer()
    opened = open_quietly(checkpoint(config, tensors | {HEAD: exact * np.float32(1.01)}, name="other"))
    with pytest.raises(CheckpointError, match=r"differs from model\.embed_tokens\.weight"):
        opened.outer()
