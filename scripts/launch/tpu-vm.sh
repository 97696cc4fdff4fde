#!/usr/bin/env bash
# Trains llama-3-8b on a Cloud TPU VM, v5litepod-16.
set -euo pipefail
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
cat > "$files/jaxlora-run.yml" <<'END_OF_FILE'
base_model: meta-llama/Llama-3.1-8B
adapter: qlora
lora_r: 16
lora_alpha: 32.0
lora_target_linear: true
quantization: int4
datasets:
- path: gs://your-bucket/rows.jsonl
  type: chat_template
sequence_len: 2048
sample_packing: true
micro_batch_size: 1
num_epochs: 1.0
learning_rate: 0.0002
gradient_checkpointing: true
output_dir: gs://your-bucket/runs/llama-3-8b
save_steps: 100.0
auto_resume_from_checkpoints: true
END_OF_FILE
cat > "$files/jaxlora-worker.sh" <<'END_OF_FILE'
set -euo pipefail
if [ -f jaxlora-env ]; then
  . ./jaxlora-env
  rm jaxlora-env
fi
mkdir -p jaxlora
cd jaxlora
python3 -m pip install --quiet --user --break-system-packages uv 2>/dev/null || python3 -m pip install --quiet --user uv
[ -x venv/bin/python ] || python3 -m uv venv --quiet --python 3.12 venv
python3 -m uv pip install --quiet --python venv/bin/python 'jaxlora[tpu]' gcsfs
metadata() {
  curl -sf -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
process_id=$(metadata agent-worker-number)
first=$(metadata worker-network-endpoints | cut -d, -f1)
coordinator=${first##*:}:8476
exec venv/bin/python -m jaxlora.cli train ../jaxlora-run.yml \
  --coordinator="$coordinator" --num-processes=4 --process-id="$process_id"
END_OF_FILE
(
  umask 077
  : > "$files/jaxlora-env"
)
{
  printf 'export HF_TOKEN=%q\n' "${HF_TOKEN:?is not set here}"
} > "$files/jaxlora-env"
tpu=(gcloud compute tpus tpu-vm)
where=(--zone=us-west4-a)
state=$("${tpu[@]}" describe llama-3-8b "${where[@]}" --format='value(state)' \
  2> /dev/null || true)
case $state in
  PREEMPTED | TERMINATED)  # it cannot be started again
    "${tpu[@]}" delete llama-3-8b "${where[@]}" --quiet
    state= ;;
esac
if [ -z "$state" ]; then
  "${tpu[@]}" create llama-3-8b "${where[@]}" --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot
fi
"${tpu[@]}" scp "$files"/jaxlora-* llama-3-8b: "${where[@]}" --worker=all
"${tpu[@]}" ssh llama-3-8b "${where[@]}" --worker=all --command='bash jaxlora-worker.sh'
echo "done; it costs until: gcloud compute tpus tpu-vm delete llama-3-8b ${where[*]}"
