"""Compiled programs that the command line keeps for the next run."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from xquant_jax.cli import compilation_cache, main
from xquant_jax.errors import XQuantWarning

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, with JAX as it is when a process starts."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    jax_cache.reset_cache()
    path = tmp_path / "compiled"
    monkeypatch.setattr(compilation_cache, "folder", lambda: path)
    yield path
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def entries(path: Path) -> list[Path]:
    return sorted(path.glob("*-cache"))


def compile_anew() -> None:
    jax.clear_caches()
    jax.block_until_ready(jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)))


def test_programs_are_kept_and_found_again(folder: Path) -> None:
    compilation_cache.switch(True)
    compile_anew()
    kept = entries(folder)
    assert kept
    contents = [path.stat().st_mtime_ns for path in kept]
    compile_anew()
    assert [path.stat().st_mtime_ns for path in entries(folder)] == contents


def test_the_option_switches_it_off(folder: Path, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert main(["convert", "nowhere", str(tmp_path / "out"), "--no-compilation-cache"]) == 2
    compile_anew()
    assert entries(folder) == entries(tmp_path / "own") == []


def test_a_folder_that_jax_was_given_is_kept(folder: Path, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    assert main(["convert", "nowhere", str(tmp_path / "out")]) == 2
    compile_anew()
    assert entries(tmp_path / "own")
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_told(folder: Path) -> None:
    folder.write_text("a file in its place")
    with pytest.warns(XQuantWarning, match="set JAX_COMPILATION_CACHE_DIR"):
        compilation_cache.switch(True)
    assert jax.config.jax_compilation_cache_dir is None
