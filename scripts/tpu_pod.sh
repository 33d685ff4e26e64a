#!/usr/bin/env bash
# A slice of TPUs from nothing to results: create, install, copy, run, fetch, delete. docs/pods.md walks through it.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/tpu_pod.sh COMMAND

  create                       a slice named $NAME: $TYPE in $ZONE, with $IMAGE
  install                      this checkout and its TPU extra, on all workers
  push PROMPTS                 the prompts, to worker 0
  run [OPTION ...]             pod_generate.py on all workers; started again after a stop it goes on
  fetch RESULTS                the results, from worker 0
  delete                       the slice and everything on it

Settings, from the environment:
  NAME     name of the slice                     (xquant)
  ZONE     as us-west4-a; required
  TYPE     accelerator type, as v5litepod-16; required by create
  IMAGE    software of the workers               (v2-alpha-tpuv5-lite)
  MODEL    directory of the model on every worker, on a shared disk or bucket mounted there; required by run
  DRY_RUN  1: print the commands and do nothing
TEXT
}

NAME=${NAME:-xquant} IMAGE=${IMAGE:-v2-alpha-tpuv5-lite}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

need() {
  for name in "$@"; do
    [ -n "${!name:-}" ] || { echo "error: set $name; see scripts/tpu_pod.sh --help" >&2; exit 2; }
  done
}

tpu() {
  local command=(gcloud compute tpus tpu-vm "$@" "--zone=$ZONE")
  if [ "${DRY_RUN:-}" = 1 ]; then printf '%q ' "${command[@]}"; echo; else "${command[@]}"; fi
}

on_all() { tpu ssh "$NAME" --worker=all --command="$1"; }

[ $# -gt 0 ] || { usage >&2; exit 2; }
command=$1
shift
case $command in
  -h | --help) usage; exit ;;
  create | install | push | run | fetch | delete) need ZONE ;;
  *) echo "error: $command is not a command" >&2; usage >&2; exit 2 ;;
esac

case $command in
  create)
    need TYPE
    tpu create "$NAME" "--accelerator-type=$TYPE" "--version=$IMAGE"
    ;;
  install)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git -C "$here" archive --format=tar.gz --prefix=xquant-jax/ -o "$archive" HEAD
    tpu scp "$archive" "$NAME:xquant-jax.tar.gz" --worker=all
    # the workers' own Python may be older than 3.12; uv brings one
    on_all 'set -e; tar xzf xquant-jax.tar.gz; cd xquant-jax; python3 -m pip install -q --user uv; \
      ~/.local/bin/uv venv -q --python 3.12 .venv; ~/.local/bin/uv pip install -q -p .venv -c constraints.txt ".[tpu]"'
    ;;
  push)
    [ $# = 1 ] || { echo 'error: push takes one file of prompts' >&2; exit 2; }
    tpu scp "$1" "$NAME:prompts.jsonl" --worker=0
    ;;
  run)
    need MODEL
    # a worker that dies takes the others along after --heartbeat-timeout; what has its result is not run again
    arguments=$(printf ' %q' "$MODEL" ../prompts.jsonl ../results.jsonl "$@")
    on_all "cd xquant-jax && .venv/bin/python scripts/pod_generate.py$arguments"
    ;;
  fetch)
    [ $# = 1 ] || { echo 'error: fetch takes the name of one file' >&2; exit 2; }
    tpu scp "$NAME:results.jsonl" "$1" --worker=0
    ;;
  delete)
    tpu delete "$NAME" --quiet
    ;;
esac
