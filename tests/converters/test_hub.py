"""Models of the Hub by name, downloaded from a stand-in that runs here: what is asked for, and every refusal."""

import shutil
import sys
from functools import partial
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants

import xquant_jax as xq
from converters import convert, local_directory, open_checkpoint
from tests.conftest import GOLDEN
from tests.converters.hub_server import COMMIT, serving
from xquant_jax.errors import CheckpointError

NAME = "some-org/Tiny_1.0"
NEEDED = [
    *("additional_chat_templates/rag.jinja", "chat_template.jinja", "config.json", "generation_config.json"),
    *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
]
UNNEEDED = [
    *("README.md", ".gitattributes", "pytorch_model.bin", "tiny-q4.gguf", "consolidated.safetensors"),
    *("original/consolidated.00.pth", "original/params.json", "onnx/model.onnx", "training_args.bin"),
]


@pytest.fixture
def repository(tmp_path):
    """A model's files as the Hub has them, with many that nobody needs."""
    directory = tmp_path / "repository"
    shutil.copytree(GOLDEN / "llama-mha", directory, ignore=shutil.ignore_patterns("golden.npz"))
    for name in (*NEEDED, *UNNEEDED):
        (directory / name).parent.mkdir(exist_ok=True)
        if not (directory / name).exists():
            (directory / name).write_text(f'{{"name": "{name}"}}')  # equal files would be downloaded once
    (directory / "tokenizer.json").unlink()  # a model loads without one
    return directory


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


@pytest.fixture
def ask(cache, monkeypatch):
    """Makes downloads ask the Hub at another address, as HF_ENDPOINT does, and without a token."""
    download = huggingface_hub.snapshot_download

    def ask(url: str) -> None:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", partial(download, endpoint=url, token=False))

    return ask


@pytest.fixture
def hub(repository, ask):
    with serving(NAME, repository) as hub:
        ask(hub.url)
        yield hub


# ---- what is downloaded


def test_only_what_is_needed_is_downloaded_once(hub, cache):
    (hub.directory / "tokenizer.json").write_text("[]")
    directory = local_directory(NAME)
    assert directory.is_relative_to(cache)
    assert sorted(hub.requested) == sorted(NEEDED)
    found = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    assert found == sorted(NEEDED)
    hub.requested.clear()
    assert local_directory(NAME) == directory
    assert hub.requested == []


def test_of_several_files_of_weights_those_that_the_index_names(hub):
    (hub.directory / "model.safetensors").unlink()
    for file in (GOLDEN / "mistral-full").glob("*"):
        shutil.copy(file, hub.directory / file.name)
    (hub.directory / "model-00001-of-00099.safetensors").write_text("left over from another version")
    directory = local_directory(NAME)
    shards = sorted(file.name for file in (GOLDEN / "mistral-full").glob("model*"))
    assert len(shards) > 2
    assert sorted(name for name in hub.requested if name.startswith("model")) == shards
    assert open_checkpoint(directory).model_config == open_checkpoint(GOLDEN / "mistral-full").model_config


def test_a_downloaded_model_answers_as_transformers_does(hub):
    model = xq.load(NAME)
    with np.load(GOLDEN / "llama-mha" / "golden.npz") as golden:
        tokens, expected = golden["tokens"][:1], golden["logits"][:1]  # the row without padding
    logits = jax.jit(partial(model.transformer.apply, method="score"))({"params": model.params}, tokens)
    assert np.abs(np.asarray(logits) - expected).max() <= 1e-4 * np.ptp(expected)  # float32 rounding


def test_a_model_of_the_hub_is_converted(hub, tmp_path):
    out = convert(NAME, tmp_path / "out", progress=False)
    assert open_checkpoint(out).model_config == open_checkpoint(GOLDEN / "llama-mha").model_config
    assert not any(file.is_symlink() for file in out.rglob("*"))


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_is_named_after_the_name(hub, revision):
    assert local_directory(f"{NAME}@{revision}").name == COMMIT


def test_without_a_network_the_cache_serves(repository, ask, monkeypatch):
    with serving(NAME, repository) as hub:
        ask(hub.url)
        directory = local_directory(NAME)
    assert local_directory(NAME) == directory
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_directory(NAME) == directory


# ---- what is a name


def test_a_directory_is_itself_even_if_the_hub_has_its_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    assert local_directory(NAME) == Path(NAME)
    assert hub.requested == []


@pytest.mark.parametrize(
    "model",
    [
        *("nowhere", "./some-org/Tiny_1.0", "/some-org/Tiny_1.0", "a/b/c", "a b/c", "../model", "~/model", "a/-b"),
        *("a/b@", "a/b@../c", Path("some-org/Tiny_1.0")),
    ],
)
def test_what_is_no_name_is_a_path_that_is_no_directory(model):
    with pytest.raises(CheckpointError, match=r"is not a directory; a model is a directory with config.json and w"):
        local_directory(model)


def test_a_file_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("some-org").mkdir()
    Path(NAME).touch()
    with pytest.raises(CheckpointError, match="is not a directory; a model is a directory"):
        local_directory(NAME)


# ---- what goes wrong


def refusal(model):
    """The error, which is one line."""
    with pytest.raises(CheckpointError) as error:
        local_directory(model)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refusal(NAME)
    assert message.startswith(f"{NAME} is not a directory, and models of the Hugging Face Hub need huggingface_hub")
    assert "pip install 'xquant-jax[hub]'" in message


def test_a_model_that_the_hub_does_not_have(hub):
    message = refusal("some-org/other")
    assert message.startswith(f"some-org/other is neither a directory here nor a model that {constants.ENDPOINT}")
    assert "check the name, and run hf auth login if the model is private" in message


def test_a_revision_that_the_model_does_not_have(hub):
    assert refusal(f"{NAME}@v2").startswith(f"{NAME} has no revision 'v2'; name a branch, a tag or a commit")


def test_a_model_whose_conditions_were_not_accepted(hub):
    hub.denied = (403, "GatedRepo")
    assert refusal(NAME).startswith(
        f"{NAME} is gated; accept its conditions at {constants.ENDPOINT}/{NAME}, then hf auth login"
    )


def test_a_hub_that_fails(hub):
    hub.denied = (507, "")
    message = refusal(NAME)
    assert message.startswith(f"{NAME} ")
    assert "507" in message


def test_no_network(ask):
    ask("http://127.0.0.1:9")
    message = refusal(NAME)
    assert message.startswith(f"{NAME} is not a directory here and cannot be downloaded from {constants.ENDPOINT}: ")
    assert message.endswith("check the network, or name a directory")


@pytest.mark.usefixtures("cache")
def test_offline_without_a_download_before(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids to download it; unset HF_HUB_OFFLINE" in refusal(NAME)
