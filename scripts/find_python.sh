#!/usr/bin/env bash
# Prints the path of a Python interpreter of one of the versions given, the first version that there is.
# Usage: find_python.sh 3.12 3.13
#
# An interpreter is believed only after it ran: a pyenv shim stands on PATH also for versions that are switched off.
# Needs nothing but bash (3.2 or newer), so that it works before anything is installed.
set -u

if [ $# = 0 ]; then
  echo "usage: find_python.sh VERSION..." >&2
  exit 2
fi

readonly VERSIONS="$*"
readonly PYENV_VERSIONS="${PYENV_ROOT:-${HOME:-}/.pyenv}/versions"
readonly UV_PYTHONS="${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}"

# Says where the interpreter itself lies, also when it is run through a shim or a virtual environment.
readonly PROBE='
import sys
if sys.version_info[:2] != tuple(map(int, sys.argv[1].split("."))):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit("cannot make virtual environments: %s" % error)
print(getattr(sys, "_base_executable", None) or sys.executable)
'

# The paths worth trying for one version, a line each.
candidates() {
  local version=$1 path
  type -aP "python$version" python3 python
  for path in "$PYENV_VERSIONS/$version".*/bin/python "$UV_PYTHONS/cpython-$version"[.-]*/bin/python3; do
    if [ -x "$path" ]; then echo "$path"; fi
  done
  if type -P uv >/dev/null; then uv python find --no-python-downloads "$version" 2>/dev/null; fi
}

rejected=""
for version in $VERSIONS; do
  while IFS= read -r candidate; do
    if path=$("$candidate" -c "$PROBE" "$version" 2>/dev/null </dev/null) && [ -x "$path" ]; then
      echo "$path"
      exit 0
    fi
    reason=$("$candidate" -c "$PROBE" "$version" 2>&1 </dev/null)
    line="    $candidate: ${reason%%$'\n'*}"
    case "$rejected" in
      *"$line"*) ;;
      *) rejected="${rejected:+$rejected$'\n'}$line" ;;
    esac
  done < <(candidates "$version")
done

printf '%s\n' >&2 \
  "No usable Python found. Needed: ${VERSIONS// / or }, with venv and ensurepip." \
  "  Searched:" \
  "    PATH   ${PATH:-(empty)}" \
  "    pyenv  $PYENV_VERSIONS" \
  "    uv     $UV_PYTHONS" \
  "  Found, but not usable:" \
  "${rejected:-    nothing}" \
  "  Install one, for example with one of these, and run the same command again:" \
  "    uv python install $1" \
  "    pyenv install $1" \
  "    apt install python$1 python$1-venv   (Debian, Ubuntu)" \
  "    dnf install python$1                   (Fedora)" \
  "    brew install python@$1                 (macOS)"
exit 1
