#!/usr/bin/env bash
# Asks for a queued v5litepod-16 that trains llama-3-8b.
set -euo pipefail
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
cat > "$files/startup.sh" <<'END_OF_FILE_'
#!/usr/bin/env bash
# Runs as root whenever a machine starts.
export HOME=${HOME:-/root}
cd "$HOME"
cat > jaxlora-run.yml <<'END_OF_FILE'
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
set -euo pipefail
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
END_OF_FILE_
queue=(gcloud compute tpus queued-resources)
where=(--zone=us-west4-a)
if state=$("${queue[@]}" describe llama-3-8b "${where[@]}" --format='value(state.state)' \
    2> /dev/null); then
  case $state in
    FAILED | SUSPENDED)  # the machines are gone; the checkpoints are in output_dir
      "${queue[@]}" delete llama-3-8b "${where[@]}" --force --quiet ;;
    *)
      echo "llama-3-8b is $state already"
      exit 0 ;;
  esac
fi
"${queue[@]}" create llama-3-8b "${where[@]}" --node-id=llama-3-8b --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot \
  --metadata-from-file="startup-script=$files/startup.sh"
echo "look:   gcloud compute tpus queued-resources describe llama-3-8b ${where[*]}"
echo "log:    gcloud compute tpus tpu-vm ssh llama-3-8b ${where[*]} --worker=0" \
  "--command='sudo journalctl -u google-startup-scripts -f'"
echo "delete: gcloud compute tpus queued-resources delete llama-3-8b ${where[*]} --force"
