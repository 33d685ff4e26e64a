"""The promises of the set-up: which Python is found, what is pinned, what make does on a fresh machine.

Nothing here needs a network: interpreters that only pretend to install stand in for Python.
"""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, requires
from importlib.util import find_spec
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
BASH = shutil.which("bash")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in CONSTRAINTS)}

BROKEN_SHIM = f"#!{BASH}\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"

# Passes for Python 3.12, makes environments that hold a copy of itself, and notes what pip is asked for.
PRETENDER = f"""#!{BASH}
case "$1 $2" in
  "-c "*ensurepip*) echo "$0" ;;
  "-m pip") [ "$3" = --version ] || {{ echo "$0 $*" >> pip.log; exit "${{PIP_STATUS:-0}}"; }} ;;
  "-c "*) exec "{sys.executable}" "$@" ;;
  "-m venv") "{shutil.which("mkdir")}" -p "$4/bin" && "{shutil.which("cp")}" "$0" "$4/bin/python" ;;
  *) echo "$0 ran $*" ;;
esac
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def find_python(home: Path, *folders: Path, version: str = "3.12") -> subprocess.CompletedProcess[str]:
    """Searches where there is nothing but what lies in `home` and, on PATH, in `folders`."""
    return subprocess.run(
        [BASH, ROOT / "scripts" / "find_python.sh", version],
        env={"HOME": str(home), "PATH": os.pathsep.join(map(str, folders or [home / "empty"]))},
        capture_output=True,
        text=True,
        check=False,
    )


class TestFindPython:
    def test_finding_none_is_an_error_that_says_where_it_looked_and_what_to_install(self, tmp_path):
        result = find_python(tmp_path)
        assert (result.returncode, result.stdout) == (1, "")
        assert "Needed: 3.12" in result.stderr
        for place in ("empty", ".pyenv/versions", ".local/share/uv/python"):
            assert str(tmp_path / place) in result.stderr
        assert "uv python install 3.12" in result.stderr

    def test_one_that_does_not_run_is_skipped(self, tmp_path):
        shim = executable(tmp_path / "shims" / "python3.12", BROKEN_SHIM)
        working = executable(tmp_path / "a folder" / "python3.12", PRETENDER)
        result = find_python(tmp_path, shim.parent, working.parent)
        assert (result.returncode, result.stdout) == (0, f"{working}\n")

    def test_one_that_does_not_run_is_named_with_its_reason(self, tmp_path):
        shim = executable(tmp_path / "shims" / "python3.12", BROKEN_SHIM)
        result = find_python(tmp_path, shim.parent)
        assert result.returncode == 1
        assert f"{shim}: pyenv: python3.12: command not found\n" in result.stderr

    @pytest.mark.parametrize(
        "place",
        [".pyenv/versions/3.12.1/bin/python", ".local/share/uv/python/cpython-3.12.1-linux/bin/python3"],
    )
    def test_one_of_a_version_manager_is_found_though_it_is_not_on_path(self, tmp_path, place):
        working = executable(tmp_path / place, PRETENDER)
        assert find_python(tmp_path).stdout == f"{working}\n"

    def test_another_version_is_not_taken(self, tmp_path):
        (tmp_path / "python3").symlink_to(sys.executable)
        result = find_python(tmp_path, tmp_path, version="3.1")
        assert result.returncode == 1
        assert f"python3: is Python 3.{sys.version_info.minor}\n" in result.stderr

    def test_a_real_one_is_found_under_its_plain_name(self, tmp_path):
        (tmp_path / "python3").symlink_to(sys.executable)
        result = find_python(tmp_path, tmp_path, version="{}.{}".format(*sys.version_info))
        assert result.returncode == 0
        assert Path(result.stdout.strip()).samefile(sys.executable)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMake:
    @pytest.fixture
    def tree(self, tmp_path) -> Path:
        """A fresh checkout, in a folder with a space in its name."""
        tree = tmp_path / "a checkout"
        for name in (".ci/run", "Makefile", "pyproject.toml", "constraints.txt", "scripts/find_python.sh"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        return tree

    @pytest.fixture
    def make(self, tmp_path) -> Callable[..., str]:
        """Runs make, or what calls it, on a machine whose first Python is a pretender; returns what it printed."""
        folder = executable(tmp_path / "bin" / "python3.12", PRETENDER).parent
        inherited = {
            name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
        }

        def run(tree: Path, *targets: str, status: int = 0, command: str = "make", **variables: str) -> str:
            environment = inherited | {"PATH": f"{folder}{os.pathsep}{inherited['PATH']}"} | variables
            result = subprocess.run(
                [*command.split(), *targets],
                cwd=tree,
                env=environment | {"MAKEFLAGS": "PYTHONS=3.12"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert result.returncode == status, result.stdout + result.stderr
            return result.stdout

        return run

    @staticmethod
    def installs(tree: Path) -> list[str]:
        return (tree / "pip.log").read_text().splitlines()

    def test_demo_installs_the_library_with_the_pinned_versions_and_runs(self, tree, make):
        assert "ran scripts/demo.py" in make(tree, "demo")
        (install,) = self.installs(tree)
        assert install.endswith("install -c constraints.txt -e .")

    def test_test_installs_the_test_extra_and_runs_pytest(self, tree, make):
        assert "ran -m pytest" in make(tree, "test")
        (install,) = self.installs(tree)
        assert install.endswith("install -c constraints.txt -e .[test]")

    def test_another_environment_can_be_named(self, tree, make):
        assert ".venv-mine/bin/python ran scripts/demo.py" in make(tree, "demo", "VENV=.venv-mine")
        assert ".venv-mine/bin/python ran scripts/demo.py" in make(tree, "demo", "VENV=.venv-mine")
        assert len(self.installs(tree)) == 1
        assert not (tree / ".venv").exists()

    def test_ci_runs_the_demo_and_the_tests_in_environments_that_only_they_made(self, tree, make):
        printed = make(tree, command=f"{BASH} .ci/run")
        ran = [line.partition(" ran ") for line in printed.splitlines() if " ran " in line]
        made = {line.partition(" ")[0]: line.partition(" -e ")[2] for line in self.installs(tree)}
        assert len(made) == len(self.installs(tree)) == 3
        assert [(made[python], command.partition(" --")[0]) for python, _, command in ran] == [
            (".", "scripts/demo.py"),
            (".[test]", "-m pytest"),
            (".[dev]", "-m ruff check"),
            (".[dev]", "-m ruff format"),
            (".[dev]", "-m basedpyright"),
        ]

    @pytest.mark.parametrize("target", ["demo", "test"])
    def test_second_run_installs_nothing(self, tree, make, target):
        make(tree, target)
        make(tree, target)
        assert len(self.installs(tree)) == 1

    def test_failed_install_stops_make_and_is_done_again(self, tree, make):
        assert "ran" not in make(tree, "demo", status=2, PIP_STATUS="1")
        assert "ran" in make(tree, "demo")
        assert len(self.installs(tree)) == 2

    @pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
    def test_changed_requirements_are_installed(self, tree, make, name):
        make(tree, "demo")
        later = (tree / ".venv" / "installed").stat().st_mtime + 1
        os.utime(tree / name, (later, later))
        make(tree, "demo")
        assert len(self.installs(tree)) == 2

    def test_copied_checkout_is_installed_anew(self, tree, make, tmp_path):
        make(tree, "demo")
        copy = shutil.copytree(tree, tmp_path / "a copy")
        make(copy, "demo")
        assert len(self.installs(copy)) == 2


class TestPins:
    def test_every_line_is_a_name_and_an_exact_version_without_an_address(self):
        for line in CONSTRAINTS:
            requirement = Requirement(line)
            assert requirement.url is None
            assert [specifier.operator for specifier in requirement.specifier] == ["=="]
        assert len(PINS) == len(CONSTRAINTS)

    @pytest.mark.parametrize("extra", ["", "plot", "lm-eval", "ruler", "train", "test", "dev"])
    def test_every_requirement_has_a_pin_that_satisfies_it(self, extra):
        lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
        for requirement in map(Requirement, lines):
            if requirement.name != PROJECT["name"]:
                assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), requirement

    def test_requirements_of_requirements_are_pinned(self):
        missing, seen, waiting = set(), set(), [(PROJECT["name"], "test"), (PROJECT["name"], "")]
        while waiting:
            name, extra = waiting.pop()
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                lines = requires(name) or []
            except PackageNotFoundError:
                continue
            for requirement in map(Requirement, lines):
                if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                    needed = canonicalize_name(requirement.name)
                    waiting += [(needed, wanted) for wanted in ("", *requirement.extras)]
                    if needed not in PINS and needed != PROJECT["name"]:
                        missing.add(needed)
        assert missing == set()


class TestPackage:
    def test_a_wheel_holds_three_typed_packages_and_the_demo_model(self, tmp_path):
        """And nothing else: what it installs lies beside everybody else's packages."""
        (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
        names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
        packages = {name.parts[0] for name in names if not name.parts[0].endswith(".dist-info")}
        assert packages == {"xquant_jax", "pallas_kernels", "converters"}
        assert {Path(package) / "py.typed" for package in packages} <= names
        assert Path("xquant_jax/demo/model.safetensors") in names

    def test_console_script_runs_the_command_line(self):
        (script,) = entry_points(group="console_scripts", name="xquant")
        assert script.value == "xquant_jax.cli:main"
        assert callable(script.load())

    @pytest.mark.parametrize("package", ["xquant_jax", "pallas_kernels", "converters"])
    def test_shapes_and_types_are_checked_in_these_tests(self, package):
        spec = find_spec(package)
        assert spec is not None
        assert type(spec.loader).__name__ == "_JaxtypingLoader"
