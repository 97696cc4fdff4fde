#!/usr/bin/env bash
# Writes the files beside it from llama-3-8b.yml: what `jaxlora launch` makes for each target.
# A test holds them to it. Change the options here to yours, or call the commands yourself.
set -euo pipefail
cd "$(dirname "$0")"
launch=(jaxlora launch llama-3-8b.yml --spot --env HF_TOKEN)
tpu=(--topology v5e:4x4 --install "jaxlora[tpu]")
gpu=(--topology h100:8 --nodes 2)
"${launch[@]}" --on tpu-vm "${tpu[@]}" --zone us-west4-a --output tpu-vm.sh
"${launch[@]:0:4}" --on queued-resource "${tpu[@]}" --zone us-west4-a --output queued-resource.sh
"${launch[@]}" --on gke "${tpu[@]}" --output gke.yml
"${launch[@]}" --on slurm "${gpu[@]}" --python python --output slurm.sbatch
"${launch[@]}" --on skypilot "${gpu[@]}" --install "jaxlora[cuda]" --output skypilot.yml
