#!/usr/bin/env bash
# From recordings to emotions on a synthetic corpus of which the best possible score is known.
# Everything it makes lies in the folder given as first argument (./workdir/demo by default); a
# demo that was stopped goes on where it was.
folder="${1:-workdir/demo}"
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" ""
source launch/malloc.sh
data="$folder/data"

made() { # dataset
  [ -d "$data/$1/1.0.0" ]
}

echo "1/6 recordings and transcripts become dialogues"
made manifest/synthetic || python -m launch.prepare --corpus=synthetic --data_dir="$data" \
  --num_dialogues=480,60,120
echo "2/6 speech becomes features: prosody"
made demo_speech || python -m launch.extract --encoder=prosody --dataset=manifest/synthetic \
  --output=demo_speech --data_dir="$data"
echo "3/6 text becomes features: MiniLM"
made demo_text || python -m launch.extract --encoder=minilm --dataset=manifest/synthetic \
  --output=demo_text --data_dir="$data"
made demo || python -m launch.extract --speech=demo_speech --text=demo_text --output=demo \
  --data_dir="$data"
echo "4/6 training"
python -m launch.train --config=configs/demo.py --config.data.data_dir="$data" \
  --workdir="$folder/run"
echo "5/6 evaluating on the test split"
python -m launch.evaluate --workdir="$folder/run" --split=test --report
echo "6/6 predicting a dialogue of the test split from its recordings and texts"
grep '"dialogue": "test_0"' "$data/synthetic_recordings/manifest.jsonl" \
  > "$data/synthetic_recordings/dialogue.jsonl"
python -m launch.predict --workdir="$folder/run" \
  --manifest="$data/synthetic_recordings/dialogue.jsonl" --output="$folder/dialogue.jsonl"
echo "report:      $folder/run/report.html"
echo "metrics:     $folder/run/metrics.json, predictions.jsonl, metrics.jsonl"
echo "pictures:    $folder/run/confusion.png, curves.png"
echo "TensorBoard: pip install tensorboard; tensorboard --logdir $folder/run"
