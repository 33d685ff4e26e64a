"""Keeps compiled programs between runs, by JAX' persistent compilation cache, in a folder of the user's."""

import argparse
import os
import warnings
from pathlib import Path

import jax
import platformdirs

from xquant_jax.errors import XQuantWarning

MOST_BYTES = 2 * 1024**3
"""What the folder may hold; programs that were not used for longest go first."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--no-compilation-cache`."""
    parser.add_argument(
        "--compilation-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"keep compiled programs for the next run, in JAX_COMPILATION_CACHE_DIR or {folder()}",
    )


def folder() -> Path:
    """Where programs are kept unless JAX is told otherwise: in the user's cache directory, as the platform has it."""
    return platformdirs.user_cache_path("xquant-jax") / "compiled"


def switch(on: bool) -> None:
    """Switches the cache on or off in this process. A folder that JAX was given already is kept, with its settings, and
    so is that JAX was told to have none.

    Warns with `XQuantWarning` where the folder cannot be written.
    """
    if not on:
        jax.config.update("jax_enable_compilation_cache", False)
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    path = folder()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} cannot be written")
    except OSError as error:
        warnings.warn(
            f"compiled programs are not kept for the next run: {error}; set JAX_COMPILATION_CACHE_DIR to a folder "
            f"that can be written, or give --no-compilation-cache",
            XQuantWarning,
            stacklevel=2,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
