#!/usr/bin/env bash
# A SLURM job for GPU clusters: one process a node, each with all of its GPUs; jax finds the others through SLURM.
#   sbatch --nodes=4 scripts/slurm_pod.sh MODEL PROMPTS.jsonl RESULTS.jsonl --mesh data=4,tensor=8 --cache xquant:4
# MODEL, PROMPTS, RESULTS and this checkout lie on a disk that all nodes share. A job that is requeued, or submitted
# again, goes on where it stopped.
#SBATCH --job-name=xquant
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch, from the checkout}"
# one process that dies ends the job, and does not leave the others waiting
exec srun --kill-on-bad-exit=1 .venv/bin/python scripts/pod_generate.py "$@"
