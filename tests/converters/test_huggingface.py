"""Reading Hugging Face directories: what is read, and what every kind of damage is called."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters.checkpoint import open_checkpoint
from converters.huggingface import HuggingFaceCheckpoint
from xquant_jax.errors import CheckpointError
from xquant_jax.parameters import leaves_of

GOLDEN = sorted(file.parent for file in (Path(__file__).parents[1] / "golden").glob("*/config.json"))
FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3")


def bits(array):
    """The bits of an array, so that comparing them is exact for every type."""
    return np.ascontiguousarray(array).view(np.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits(a), bits(b))


# ---- what is read


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_weights_keep_their_bits_and_kernels_are_in_out(checkpoint, tiny_config, tiny_tensors, dtype, shards):
    config = tiny_config("llama", torch_dtype=dtype)
    tensors = tiny_tensors(config, dtype)
    opened = HuggingFaceCheckpoint(checkpoint(config, tensors, shards))
    assert opened.config == config
    assert opened.model_config.dtype == dtype
    layer, outer = opened.layer(1), opened.outer()
    prefix = "model.layers.1."
    assert layer["query"]["kernel"].shape == (24, 24)
    assert layer["down"]["kernel"].shape == (20, 24)
    assert same(layer["key"]["kernel"], tensors[prefix + "self_attn.k_proj.weight"].T)
    assert same(layer["output"]["kernel"], tensors[prefix + "self_attn.o_proj.weight"].T)
    assert same(layer["down"]["kernel"], tensors[prefix + "mlp.down_proj.weight"].T)
    assert same(layer["attention_norm"]["scale"], tensors[prefix + "input_layernorm.weight"])
    assert same(layer["mlp_norm"]["scale"], tensors[prefix + "post_attention_layernorm.weight"])
    assert same(outer["embed"]["embedding"], tensors["model.embed_tokens.weight"])
    assert same(outer["final_norm"]["scale"], tensors["model.norm.weight"])
    assert same(outer["head"]["kernel"], tensors["lm_head.weight"].T)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_tensor_of_a_family_is_read_once(checkpoint, tiny_config, tiny_tensors, family):
    config = tiny_config(family, **({} if family == "mistral" else {"attention_bias": True}))
    tensors = tiny_tensors(config)
    opened = HuggingFaceCheckpoint(checkpoint(config, tensors))
    leaves = [leaf for i in range(2) for leaf in leaves_of(opened.layer(i)).values()]
    leaves += leaves_of(opened.outer()).values()
    assert sorted(leaf.sum() for leaf in leaves) == pytest.approx(sorted(t.sum() for t in tensors.values()))


@pytest.mark.parametrize("directory", GOLDEN, ids=lambda directory: directory.name)
def test_checkpoints_that_transformers_wrote(directory):
    opened = HuggingFaceCheckpoint(directory)
    stored = {}
    for file in directory.glob("*.safetensors"):
        stored |= load_file(file)
    read = sum(len(leaves_of(opened.layer(i))) for i in range(opened.model_config.num_layers))
    assert read + len(leaves_of(opened.outer())) == len(stored)
    last = opened.model_config.num_layers - 1
    assert same(opened.layer(last)["gate"]["kernel"], stored[f"model.layers.{last}.mlp.gate_proj.weight"].T)


def test_parts_can_be_read_alone(checkpoint):
    opened = HuggingFaceCheckpoint(checkpoint())
    assert list(opened.outer(["head"])) == ["head"]
    assert list(opened.outer(part for part in ("final_norm", "embed"))) == ["embed", "final_norm"]


def test_norms_may_be_float32_beside_bfloat16(checkpoint, tiny_config, tiny_tensors):
    tensors = tiny_tensors(tiny_config("llama"), "bfloat16")
    tensors = {name: t.astype(np.float32) if "norm" in name else t for name, t in tensors.items()}
    opened = HuggingFaceCheckpoint(checkpoint(tensors=tensors))
    assert opened.model_config.dtype == "bfloat16"
    assert opened.layer(0)["attention_norm"]["scale"].dtype == np.float32


def test_names_without_the_leading_model(checkpoint, tiny_config, tiny_tensors):
    tensors = tiny_tensors(tiny_config("llama"))
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    opened = HuggingFaceCheckpoint(checkpoint(tensors=bare))
    assert same(opened.layer(0)["up"]["kernel"], tensors["model.layers.0.mlp.up_proj.weight"].T)


def test_stored_rotary_frequencies_are_ignored(checkpoint, tiny_config, tiny_tensors):
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.inv_freq")
    extra = {name: np.ones(3, np.float32) for name in names}
    opened = HuggingFaceCheckpoint(checkpoint(tensors=tiny_tensors(tiny_config("llama")) | extra))
    assert "query" in opened.layer(0)


# ---- tied embeddings


def test_tied_embeddings_have_no_head(checkpoint, tiny_config, tiny_tensors):
    config = tiny_config("llama", tie_word_embeddings=True)
    tensors = tiny_tensors(config)
    assert "head" not in HuggingFaceCheckpoint(checkpoint(config, tensors)).outer()
    copied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    assert "head" not in HuggingFaceCheckpoint(checkpoint(config, copied, name="copied")).outer()


def test_a_tied_head_that_differs_is_an_error(checkpoint, tiny_config, tiny_tensors):
    config = tiny_config("llama", tie_word_embeddings=True)
    head = {"lm_head.weight": tiny_tensors(config)["model.embed_tokens.weight"] + 1}
    opened = HuggingFaceCheckpoint(checkpoint(config, tiny_tensors(config) | head))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight in model\.safetensors differs.*tie_word_embeddings"):
        opened.outer()


def test_an_untied_model_needs_its_head(checkpoint, tiny_config, tiny_tensors):
    tensors = tiny_tensors(tiny_config("llama", tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match=r"no tensor lm_head\.weight"):
        HuggingFaceCheckpoint(checkpoint(tensors=tensors))


# ---- files that are missing or damaged


def test_a_path_that_is_no_directory(tmp_path):
    for open_it in (HuggingFaceCheckpoint, open_checkpoint):
        with pytest.raises(CheckpointError, match="nowhere is not a directory"):
            open_it(tmp_path / "nowhere")


def test_no_config(checkpoint):
    directory = checkpoint()
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"source has no config\.json"):
        HuggingFaceCheckpoint(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json is not valid JSON"),
        ("[1]", "JSON object, not list"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_a_config_that_is_no_json(checkpoint, content, message):
    directory = checkpoint()
    (directory / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceCheckpoint(directory)


def test_no_weights(checkpoint):
    directory = checkpoint()
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"model\.safetensors and model\.safetensors\.index\.json"):
        HuggingFaceCheckpoint(directory)


SECOND = "model-00002-of-00003.safetensors"


def test_a_missing_shard(checkpoint):
    directory = checkpoint(shards=3)
    (directory / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"{SECOND} is missing; .*index.json places model.norm.weight in it"):
        HuggingFaceCheckpoint(directory)


@pytest.mark.parametrize("damage", ["truncated", "cut in the header", "empty", "garbage", "header"])
def test_a_damaged_shard(checkpoint, damage):
    directory = checkpoint(shards=3)
    file = directory / SECOND
    content = file.read_bytes()
    broken = {
        "truncated": content[:-1],
        "cut in the header": content[:20],
        "empty": b"",
        "garbage": bytes(range(256)) * 4,
        "header": content[:8] + b"?" + content[9:],
    }
    file.write_bytes(broken[damage])
    with pytest.raises(CheckpointError, match=f"{SECOND} is truncated, corrupt or unreadable"):
        HuggingFaceCheckpoint(directory)


def edit_index(directory, change):
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def test_an_index_that_names_a_tensor_its_shard_lacks(checkpoint):
    directory = checkpoint(shards=3)
    edit_index(
        directory,
        lambda index: index["weight_map"].update({"model.norm.weight": f"{SECOND[:10]}3{SECOND[11:]}"}),
    )
    with pytest.raises(CheckpointError, match=r"00003-of-00003.safetensors has no tensor model.norm.weight"):
        HuggingFaceCheckpoint(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "has no weight_map"),
        (lambda index: index["weight_map"].update({"model.norm.weight": 3}), "has no weight_map"),
        (
            lambda index: index["weight_map"].update({"model.norm.weight": "../x"}),
            r"'\.\./x'.*same directory",
        ),
    ],
)
def test_an_index_that_makes_no_sense(checkpoint, change, message):
    directory = checkpoint(shards=3)
    edit_index(directory, change)
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceCheckpoint(directory)


# ---- tensors that do not fit the config

QUERY = "model.layers.1.self_attn.q_proj.weight"


def test_a_missing_tensor(checkpoint, tiny_config, tiny_tensors):
    tensors = tiny_tensors(tiny_config("llama"))
    del tensors[QUERY]
    with pytest.raises(CheckpointError, match=f"no tensor {QUERY}, which its config.json requires"):
        HuggingFaceCheckpoint(checkpoint(tensors=tensors))


@pytest.mark.parametrize(
    "extra", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "adapter.weight"]
)
def test_an_unexpected_tensor(checkpoint, tiny_config, tiny_tensors, extra):
    tensors = tiny_tensors(tiny_config("llama")) | {extra: np.ones(24, np.float32)}
    with pytest.raises(CheckpointError, match=f"{extra} in model.safetensors: a model of this config.json has no"):
        HuggingFaceCheckpoint(checkpoint(tensors=tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"intermediate_size": 21},
            r"mlp\.gate_proj\.weight in model\.safetensors has shape \[20, 24\], "
            r"but config\.json makes it \[21, 24\] \(intermediate_size, hidden_size\)",
        ),
        (
            {"num_key_value_heads": 1},
            r"k_proj\.weight.*\[12, 24\].*\[6, 24\] \(num_key_value_heads \* head_dim, hidden_size\)",
        ),
        (
            {"head_dim": 8},
            r"q_proj\.weight.*\[24, 24\].*\[32, 24\] \(num_attention_heads \* head_dim, hidden_size\)",
        ),
        ({"vocab_size": 31}, r"embed_tokens\.weight.*\[30, 24\].*\[31, 24\] \(vocab_size, hidden_size\)"),
        ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..* and 8 more: a model of this config\.json has no"),
        ({"attention_bias": True}, r"no tensor model\.layers\.0\.self_attn\.q_proj\.bias"),
        ({"tie_word_embeddings": True, "vocab_size": 31}, "embed_tokens"),
    ],
)
def test_shapes_that_do_not_fit(checkpoint, tiny_config, tiny_tensors, changes, message):
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceCheckpoint(checkpoint(tiny_config("llama") | changes, tiny_tensors(tiny_config("llama"))))


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.int8, "I8"), (np.float64, "F64"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")]
)
def test_types_that_are_not_supported(checkpoint, tiny_config, tiny_tensors, dtype, name):
    tensors = tiny_tensors(tiny_config("llama"))
    tensors[QUERY] = tensors[QUERY].astype(dtype)
    with pytest.raises(CheckpointError, match=f"{QUERY} in model.safetensors is {name}; supported: BF16, F16, F32"):
        HuggingFaceCheckpoint(checkpoint(tensors=tensors))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(checkpoint, tiny_config, tiny_tensors, dtype, value):
    tensors = tiny_tensors(tiny_config("llama"), dtype)
    tensors[QUERY][3, 5] = value
    opened = HuggingFaceCheckpoint(checkpoint(tensors=tensors))
    assert "query" in opened.layer(0)
    with pytest.raises(CheckpointError, match=f"{QUERY} in model.safetensors has values that are not finite"):
        opened.layer(1)


def test_the_largest_finite_values_are_accepted(checkpoint, tiny_config, tiny_tensors):
    for dtype in (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        tensors = tiny_tensors(tiny_config("llama"), dtype.name)
        tensors["model.norm.weight"][0] = -ml_dtypes.finfo(dtype).max
        opened = HuggingFaceCheckpoint(checkpoint(tensors=tensors, name=dtype.name))
        assert opened.outer()["final_norm"]["scale"][0] == -ml_dtypes.finfo(dtype).max


def test_symbolic_links_as_in_the_hub_cache(checkpoint, tmp_path):
    directory = checkpoint()
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in directory.iterdir():
        (linked / file.name).symlink_to(file)
    assert same(
        HuggingFaceCheckpoint(linked).layer(0)["up"]["kernel"],
        HuggingFaceCheckpoint(directory).layer(0)["up"]["kernel"],
    )
    shutil.rmtree(directory)
    with pytest.raises(CheckpointError):
        HuggingFaceCheckpoint(linked)


def test_a_single_file_is_preferred_to_an_index(checkpoint, tiny_config, tiny_tensors):
    directory = checkpoint(shards=2)
    other = tiny_tensors(tiny_config("llama"), seed=1)
    save_file(other, directory / "model.safetensors")
    assert same(
        HuggingFaceCheckpoint(directory).layer(0)["up"]["kernel"],
        other["model.layers.0.mlp.up_proj.weight"].T,
    )
