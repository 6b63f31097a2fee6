#!/usr/bin/env bash
# Runs all steps from recordings to predictions on a synthetic corpus, for which the best possible
# scores are known. Writes to FOLDER (default: workdir/demo). Run it again to resume an interrupted
# demo.
#
#   launch/demo.sh [FOLDER]
case "${1:-}" in
  --help)
    sed -n '2,/^case/{/^case/!s/^# \{0,1\}//p;}' "$0"
    exit
    ;;
  -*)
    echo "error: unknown option $1; see --help" >&2
    exit 2
    ;;
esac
folder="${1:-workdir/demo}"
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" train
source launch/malloc.sh
data="$folder/data"

has_dataset() {
  [ -d "$data/$1/1.0.0" ]
}

echo "1/6 preparing dialogues from recordings and transcripts"
has_dataset manifest/synthetic || mister-jax prepare --corpus=synthetic --data_dir="$data" \
  --num_dialogues=480,60,120
echo "2/6 extracting speech features: prosody"
has_dataset demo_speech || mister-jax extract --encoder=prosody \
  --dataset=manifest/synthetic --output=demo_speech --data_dir="$data"
echo "3/6 extracting text features: MiniLM"
has_dataset demo_text || mister-jax extract --encoder=minilm \
  --dataset=manifest/synthetic --output=demo_text --data_dir="$data"
has_dataset demo || mister-jax extract --speech=demo_speech --text=demo_text --output=demo \
  --data_dir="$data"
echo "4/6 training"
mister-jax train --config=configs/demo.py --config.data.data_dir="$data" \
  --workdir="$folder/run"
echo "5/6 evaluating on the test split"
mister-jax evaluate --workdir="$folder/run" --split=test --report
echo "6/6 predicting a test dialogue from its recordings and texts"
grep '"dialogue": "test_0"' "$data/synthetic_recordings/manifest.jsonl" \
  > "$data/synthetic_recordings/dialogue.jsonl"
mister-jax predict --model="$folder/run" \
  --manifest="$data/synthetic_recordings/dialogue.jsonl" --output="$folder/dialogue.jsonl"
echo "report:      $folder/run/report.html"
echo "metrics:     $folder/run/metrics.json, predictions.jsonl, metrics.jsonl"
echo "figures:     $folder/run/confusion.png, curves.png"
echo "TensorBoard: pip install tensorboard; tensorboard --logdir $folder/run"
