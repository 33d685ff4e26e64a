"""Which part may import which, and how long a file may be. Imports for type checking, and in functions, count too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    {"errors"},
    {"numerics", "json_file", "figures"},
    {"config", "speculation"},
    {"parameters", "sharding"},
    {"cache"},
    {"calibration"},
    {"model"},
    {"generation", "planning"},
    {"evaluation", "serving"},
    {"cli"},
)
"""The parts of xquant_jax, the lowest first. A part imports itself and lower ones, not its neighbours."""

CACHE = (
    {"methods"},
    {"config"},
    {"partition"},
    {"state"},
    {"store", "shared", "layer"},
    {"append", "flush", "attend", "rows", "newest"},
    {"prefix"},
)
"""The same for the files of xquant_jax.cache."""

OTHERS = {
    "pallas_kernels": ("xquant_jax.errors", "xquant_jax.numerics"),
    "converters": ("xquant_jax.errors", "xquant_jax.config", "xquant_jax.parameters", "xquant_jax.numerics.rope"),
}
"""What the other two packages import besides themselves."""

LONGEST = 300
"""Lines of a file; what is longer holds more than one idea."""


def imports(path: Path) -> Iterator[str]:
    """Every imported name in full, `xquant_jax.cache.state.Cache`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(folder: str, layers: tuple[set[str], ...]) -> list[str]:
    """Imports among the parts of a folder that lead to a neighbour or to a layer above."""
    level = {part: number for number, parts in enumerate(layers) for part in parts}
    package, wrong = folder.replace("/", "."), []
    for path in sorted((ROOT / folder).rglob("*.py")):
        part = path.relative_to(ROOT / folder).with_suffix("").parts[0]
        if part in ("__init__", "__main__"):  # the front doors lead everywhere
            continue
        for name in imports(path):
            if name.startswith(f"{package}."):
                other = name.removeprefix(f"{package}.").split(".")[0]
                if other != part and level[other] >= level[part]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    return wrong


def test_no_part_imports_upwards() -> None:
    assert upward("xquant_jax", LAYERS) == []


def test_no_file_of_the_cache_imports_upwards() -> None:
    assert upward("xquant_jax/cache", CACHE) == []


@pytest.mark.parametrize("package", OTHERS)
def test_the_other_packages_know_only_the_vocabulary(package: str) -> None:
    known = (package, *OTHERS[package])
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imports(path)
        if name.split(".")[0] in ("xquant_jax", *OTHERS) and not f"{name}.".startswith(tuple(f"{k}." for k in known))
    ]
    assert wrong == []


def test_kernels_are_used_where_the_cache_is_read_and_planned() -> None:
    users = {
        path.relative_to(ROOT / "xquant_jax").parts[0]
        for path in (ROOT / "xquant_jax").rglob("*.py")
        if any(name.split(".")[0] == "pallas_kernels" for name in imports(path))
    }
    assert users <= {"cache", "model", "planning"}


def test_no_file_is_long() -> None:
    lengths = {p.relative_to(ROOT): len(p.read_text("utf-8").splitlines()) for p in (ROOT / "xquant_jax").rglob("*.py")}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}
