"""The conversion: what it writes is what was read, and what it cannot finish it does not leave behind."""

import collections
import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from converters import ConvertedCheckpoint, HuggingFaceCheckpoint, conversion, convert, layer_factors, open_checkpoint
from converters.conversion import converted_bytes
from converters.manifest import bytes_on_disk
from xquant_jax.errors import CheckpointError, ConfigError
from xquant_jax.parameters import leaves_of

ROOT = Path(__file__).parents[2]
GOLDEN = sorted(file.parent for file in (ROOT / "tests" / "golden").glob("*/config.json"))


def names(directory):
    """What is in a directory, hidden files too, sorted."""
    return sorted(file.name for file in directory.iterdir())


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


def same(a, b):
    """Equal structure, types and bits."""
    a, b = leaves_of(a), leaves_of(b)
    return a.keys() == b.keys() and all(
        a[path].dtype == b[path].dtype and np.array_equal(bits(a[path]), bits(b[path])) for path in a
    )


def assert_same_model(converted, source):
    assert converted.model_config == source.model_config
    assert converted.config == source.config
    assert converted.factor_kinds == source.factor_kinds
    assert same(converted.outer(), source.outer())
    for index in range(source.model_config.num_layers):
        assert same(converted.layer(index), source.layer(index))
        factors = layer_factors(source.factor_kinds, source.layer(index), source.model_config)
        for kind in source.factor_kinds:
            assert same(converted.factors(kind, index), factors[kind])


# ---- what is written


@pytest.mark.parametrize("directory", GOLDEN, ids=lambda directory: directory.name)
def test_a_converted_checkpoint_is_the_source(directory, tmp_path):
    out = convert(directory, tmp_path / "out", progress=False)
    converted = open_checkpoint(out)
    assert isinstance(converted, ConvertedCheckpoint)
    assert_same_model(converted, HuggingFaceCheckpoint(directory))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_type_keeps_its_bits(checkpoint, tiny_config, tiny_tensors, tmp_path, dtype):
    source = checkpoint(tensors=tiny_tensors(tiny_config("llama"), dtype), shards=3)
    convert(source, tmp_path / "out", progress=False)
    assert_same_model(open_checkpoint(tmp_path / "out"), open_checkpoint(source))
    assert open_checkpoint(tmp_path / "out").model_config.dtype == dtype


def test_what_is_stored_in_another_type_is_written_in_the_models(checkpoint, tiny_config, tiny_tensors, tmp_path):
    config = tiny_config("llama", torch_dtype="bfloat16")
    with pytest.warns(UserWarning, match="cast to bfloat16"):
        convert(checkpoint(config, tiny_tensors(config, "float32")), tmp_path / "out", progress=False)
    converted = open_checkpoint(tmp_path / "out")  # no warning: nothing is left to cast
    with pytest.warns(UserWarning, match="cast to bfloat16"):
        assert_same_model(converted, open_checkpoint(tmp_path / "source"))
    assert converted.layer(0)["query"]["kernel"].dtype == converted.model_config.dtype == "bfloat16"
    manifest = json.loads((tmp_path / "out" / "xquant.json").read_text())
    assert (manifest["dtype"], manifest["source"]["lm_head.weight"]["dtype"]) == ("bfloat16", "F32")


def test_the_layout(checkpoint, tmp_path):
    source = checkpoint()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        (source / name).write_text(f'{{"file": "{name}"}}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (source / "tokenizer.json").chmod(0o444)
    out = tmp_path / "out"
    out.mkdir()  # an empty directory is as good as none
    assert convert(str(source), str(out), progress=False) == out
    assert {file.name for file in out.iterdir()} == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("outer", "layers", "factors", "xquant.json", "additional_chat_templates"),
    }
    assert (out / "tokenizer.json").read_text() == '{"file": "tokenizer.json"}'
    assert (out / "additional_chat_templates" / "rag.jinja").read_text() == "{{ messages }}"
    assert {file.name for file in (out / "outer").iterdir()} == {"embed", "final_norm", "head"}
    assert {file.name for file in (out / "layers").iterdir()} == {"00000", "00001"}
    assert {file.name for file in (out / "factors" / "per_head").iterdir()} == {"00000", "00001"}
    assert out.stat().st_mode & 0o777 == source.stat().st_mode & 0o777
    assert names(tmp_path) == ["out", "source"]

    manifest = json.loads((out / "xquant.json").read_text())
    assert manifest["num_layers"] == 2
    assert manifest["factor_kinds"] == ["joint", "per_head", "kv"]
    assert len(manifest["items"]) == 3 + 2 + 6
    assert manifest["source"]["lm_head.weight"] == {
        "file": "model.safetensors",
        "dtype": "F32",
        "shape": [30, 24],
    }
    assert str(tmp_path) not in (out / "xquant.json").read_text()


def test_a_multi_head_model_has_no_factors(checkpoint, tiny_config, tmp_path):
    source = checkpoint(tiny_config("llama", num_key_value_heads=4))
    out = convert(source, tmp_path / "out", progress=False)
    assert not (out / "factors").exists()
    assert open_checkpoint(out).factor_kinds == ()
    with pytest.raises(ConfigError, match="factors='joint' do not exist"):
        open_checkpoint(out).factors("joint", 0)


def test_the_estimate_of_the_size_is_an_upper_bound(checkpoint, tmp_path):
    source = checkpoint()
    out = convert(source, tmp_path / "out", progress=False)
    blocks = sum(512 * file.stat().st_blocks for file in out.rglob("*"))
    assert max(blocks, bytes_on_disk(out)) < converted_bytes(open_checkpoint(source).model_config)


def test_one_layer_is_read_at_a_time_and_every_tensor_once(checkpoint, tmp_path, monkeypatch):
    events = []
    read, write = HuggingFaceCheckpoint._read, conversion.write_tree

    def note_read(self, parameter, layer):
        events.append(layer)
        return read(self, parameter, layer)

    def note_write(path, tree):
        events.append("write")
        write(path, tree)

    monkeypatch.setattr(HuggingFaceCheckpoint, "_read", note_read)
    monkeypatch.setattr(conversion, "write_tree", note_write)
    convert(checkpoint(), tmp_path / "out", progress=False)
    runs = [event for event, before in zip(events, [object(), *events], strict=False) if event != before]
    assert runs == [None, "write", None, "write", None, "write", 0, "write", 1, "write"]
    assert collections.Counter(events) == {None: 3, 0: 9, 1: 9, "write": 11}


def test_progress_is_one_plain_line_per_step_without_a_terminal(checkpoint, tmp_path, capsys):
    source = checkpoint()
    convert(source, tmp_path / "shown")
    assert capsys.readouterr().err.splitlines() == ["1/3 embedding and head", "2/3 layer 0", "3/3 layer 1"]
    convert(source, tmp_path / "hidden", progress=False)
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_bar_on_a_terminal(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    convert(checkpoint(), tmp_path / "out")
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "\x1b[" in shown


# ---- what is refused before any work


@pytest.fixture
def nothing_written(monkeypatch):
    def refuse(path, tree):
        raise AssertionError(f"{path} was written")

    monkeypatch.setattr(conversion, "write_tree", refuse)


@pytest.mark.usefixtures("nothing_written")
def test_a_place_that_is_taken(checkpoint, tmp_path):
    source = checkpoint()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    (tmp_path / "file").touch()
    for out, message in [
        (tmp_path / "full", "full is not empty; choose a new directory"),
        (tmp_path / "file", "file is a file"),
        (source, "lies in the source"),
        (source / "inside", "lies in the source"),
        (tmp_path / "file" / "below", "cannot be written"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            convert(source, out, progress=False)
    assert {file.name for file in tmp_path.iterdir()} == {"full", "file", "source"}
    assert (tmp_path / "full" / "kept").exists()


@pytest.mark.usefixtures("nothing_written")
def test_a_source_that_is_damaged_or_missing(checkpoint, tiny_config, tiny_tensors, tmp_path):
    tensors = tiny_tensors(tiny_config("llama"))
    last = "model.layers.1.mlp.down_proj.weight"
    source = checkpoint(tensors=tensors | {last: tensors[last][:-1]})
    with pytest.raises(CheckpointError, match=f"{last} in model.safetensors has shape"):
        convert(source, tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match="absent is not a directory"):
        convert(tmp_path / "absent", tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match="rope_type='su'"):
        convert(
            checkpoint(tiny_config("llama", rope_scaling={"type": "su"}), name="unknown"),
            tmp_path / "out",
            progress=False,
        )
    assert {file.name for file in tmp_path.iterdir()} == {"source", "unknown"}


@pytest.mark.usefixtures("nothing_written")
def test_a_disk_with_too_little_space(checkpoint, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"has 0\.00 GB free, but the converted checkpoint takes 0\.00 GB"):
        convert(checkpoint(), tmp_path / "out", progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_converted_source(checkpoint, tmp_path):
    out = convert(checkpoint(), tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match="out is converted already"):
        convert(out, tmp_path / "again", progress=False)


# ---- what fails half way leaves nothing


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (CheckpointError("the disk is full"), CheckpointError),
        (MemoryError(), MemoryError),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_half_way_leaves_nothing(checkpoint, tmp_path, monkeypatch, failure, raised, existing):
    source, out = checkpoint(), tmp_path / "out"
    if existing:
        out.mkdir()
    write, calls = conversion.write_tree, []

    def fail_later(path, tree):
        calls.append(path)
        if len(calls) == 6:
            assert any(path.parents[1].iterdir())  # there is something to clean up
            raise failure
        write(path, tree)

    monkeypatch.setattr(conversion, "write_tree", fail_later)
    with pytest.raises(raised):
        convert(source, out, progress=False)
    assert len(calls) == 6
    assert names(tmp_path) == (["out", "source"] if existing else ["source"])
    assert not existing or not any(out.iterdir())


def test_a_disk_that_fills_up_at_the_last_file(checkpoint, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match="out cannot be written: the disk is full"):
        convert(checkpoint(), tmp_path / "out", progress=False)
    assert names(tmp_path) == ["source"]


def test_weights_that_are_not_finite_leave_nothing(checkpoint, tiny_config, tiny_tensors, tmp_path):
    tensors = tiny_tensors(tiny_config("llama"))
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight in .* not finite"):
        convert(checkpoint(tensors=tensors), tmp_path / "out", progress=False)
    assert names(tmp_path) == ["source"]


HANGING = """
import sys, time
from converters import conversion
write, calls = conversion.write_tree, []
def hang(path, tree):
    calls.append(path)
    if len(calls) == 5:
        print("hanging", flush=True)
        time.sleep(60)
    write(path, tree)
conversion.write_tree = hang
conversion.convert(sys.argv[1], sys.argv[2], progress=False)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_no_directory(checkpoint, tmp_path, number):
    source, out = checkpoint(), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(source), str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hanging\n"
        if number == signal.SIGKILL:
            convert(source, out, progress=False)  # does not touch what another process is writing
            assert len(names(tmp_path)) == 3
            shutil.rmtree(out)
        process.send_signal(number)
    left = [name for name in names(tmp_path) if name != "source"]
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert left == []
        return
    assert len(left) == 1
    assert left[0].startswith(".out.partial-")
    convert(source, out, progress=False)  # removes what nobody is writing any more
    assert names(tmp_path) == ["out", "source"]


def test_conversion_works_outside_the_main_thread(checkpoint, tmp_path):
    source = checkpoint()
    thread = threading.Thread(target=convert, args=(source, tmp_path / "out"), kwargs={"progress": False})
    thread.start()
    thread.join()
    assert open_checkpoint(tmp_path / "out").model_config.num_layers == 2


# ---- opening


def test_open_checkpoint_knows_what_it_was_given(checkpoint, tmp_path):
    source = checkpoint()
    assert isinstance(open_checkpoint(source), HuggingFaceCheckpoint)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"looked for xquant\.json .* config\.json with model\.safetensors"):
        open_checkpoint(empty)


@pytest.fixture
def converted(checkpoint, tmp_path):
    return convert(checkpoint(), tmp_path / "out", progress=False)


def test_a_directory_without_manifest_was_not_finished(converted):
    (converted / "xquant.json").unlink()
    with pytest.raises(CheckpointError, match="conversion was not finished"):
        open_checkpoint(converted)


def test_a_folder_of_ones_own_beside_the_weights_is_no_conversion(checkpoint):
    (checkpoint() / "layers").mkdir()
    assert open_checkpoint(checkpoint()).model_config.num_layers


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_damage_after_the_conversion_is_found_on_opening(converted):
    def refused(message):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(converted)

    manifest, config = converted / "xquant.json", converted / "config.json"
    original = manifest.read_text()
    for changes, message in [
        ({"version": 99}, "version 99; this program reads .* version 3"),
        ({"num_layers": 3}, "3 layers, but its config.json says num_hidden_layers=2"),
        ({"factor_kinds": []}, r"has factors \[\], but"),
    ]:
        edit_json(manifest, **changes)
        refused(message)
        manifest.write_text(original)
    manifest.write_text(original[:100])
    refused("xquant.json is not valid JSON")
    values = json.loads(original)
    del values["items"]
    manifest.write_text(json.dumps(values))
    refused("xquant.json is incomplete")
    manifest.write_text(original)

    edit_json(config, intermediate_size=21)
    with pytest.raises(CheckpointError, match=r"00000 has .*kernel of shape .*20.* but config.json makes it .*21"):
        open_checkpoint(converted).layer(0)
    edit_json(config, intermediate_size=20)

    data = max((converted / "layers" / "00001").rglob("*"), key=lambda file: file.is_file() * file.stat().st_size)
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    refused("layers/00001 holds .* bytes instead of .*damaged")
    data.write_bytes(content)
    assert "query" in open_checkpoint(converted).layer(1)
    shutil.rmtree(converted / "factors" / "kv" / "00000")
    refused("factors/kv/00000 holds 0 bytes")
