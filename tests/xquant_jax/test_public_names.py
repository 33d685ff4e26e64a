"""The public names: written once, in `__init__.pyi`, and each there to be had."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import xquant_jax as xq

STUB = Path(xq.__file__).with_name("__init__.pyi").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", re.findall(r" as (\w+)$", STUB, re.MULTILINE))
def test_a_name_of_the_stub_is_there_and_listed(name: str) -> None:
    assert getattr(xq, name).__module__.startswith("xquant_jax.")
    assert name in dir(xq)
    assert name in xq.__all__


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="generate_all"):
        xq.generate_all  # noqa: B018


@pytest.mark.parametrize(
    "first", ["xquant_jax", "pallas_kernels", "converters", "xquant_jax.cli", "xquant_jax.planning.plan"]
)
def test_any_package_may_be_imported_first(first: str) -> None:
    code = f"import {first}, xquant_jax as xq; xq.load, xq.generate, xq.step"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
