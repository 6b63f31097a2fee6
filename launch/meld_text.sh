#!/usr/bin/env bash
# Trains the packaged model meld-text from the CSV files of MELD, and exports it.
#
#   launch/meld_text.sh CSV_FOLDER WORK [SEED...]
#
# CSV_FOLDER contains train_sent_emo.csv, dev_sent_emo.csv and test_sent_emo.csv. For each seed
# (default: 0, 1 and 2), this script fine-tunes MiniLM with LoRA on single utterances, and trains
# MiSTER-E's text expert on the dialogues of the resulting vectors. The seed with the highest
# weighted F1 on validation is exported to WORK/meld-text. Run the script again to resume.
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0"
}

if [ "${1:-}" = "--help" ]; then
  usage
  exit
fi
if [ $# -lt 2 ]; then
  usage >&2
  exit 2
fi
if ! command -v mister-jax >/dev/null; then
  echo "error: mister-jax is not installed, or its virtual environment is not active" >&2
  exit 2
fi
source_folder=$1
work=$2
shift 2
seeds=("$@")
[ ${#seeds[@]} -gt 0 ] || seeds=(0 1 2)
data=$work/data

if [ ! -d "$data/meld/text" ]; then
  mister-jax prepare --corpus=meld --config=text --source="$source_folder" --data_dir="$data"
fi
for seed in "${seeds[@]}"; do
  encoder=$work/encoder_$seed
  run=$work/run_$seed
  mister-jax train --config=text_encoder:meld,minilm_lora --config.seed="$seed" \
    --config.data.data_dir="$data" --workdir="$encoder"
  if [ ! -d "$data/meld_text_$seed" ]; then
    mister-jax extract --workdir="$encoder" --dataset=meld/text --output="meld_text_$seed" \
      --data_dir="$data"
  fi
  mister-jax train --config="fusion:meld_text_$seed,text_only,focal" --config.seed="$seed" \
    --config.data.data_dir="$data" --workdir="$run"
  for split in validation test; do
    mister-jax evaluate --workdir="$run" --split="$split"
  done
done

best=$(
  for seed in "${seeds[@]}"; do
    # In $(...), set -e does not apply.
    python - "$work/run_$seed/metrics.json" "$seed" <<'PYTHON' || exit
import json
import pathlib
import sys

scores = json.loads(pathlib.Path(sys.argv[1]).read_text())
print(*(f"{scores[split]['weighted_f1']:.4f}" for split in ("validation", "test")), sys.argv[2])
PYTHON
  done | tee -a /dev/stderr | sort | tail -n 1 | cut -d ' ' -f 3
)
echo "above: weighted F1 on validation, on test, and seed; exporting seed $best" >&2
mister-jax export --model="$work/run_$best" --output="$work/meld-text" --overwrite
