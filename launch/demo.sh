#!/usr/bin/env bash
# Trains and evaluates MiSTER-E on synthetic dialogues of which the best possible score is known.
# Everything it makes lies in the folder given as first argument (./workdir/demo by default).
folder="${1:-workdir/demo}"
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" demo

echo "1/3 preparing synthetic dialogue features"
python -m launch.prepare --corpus=synthetic_features --data_dir="$folder/data" --overwrite
echo "2/3 training (goes on where it stopped, if it was stopped)"
python -m launch.train --config=configs/demo.py --config.data.data_dir="$folder/data" \
  --workdir="$folder/run"
echo "3/3 evaluating on the test split"
python -m launch.evaluate --workdir="$folder/run" --split=test
echo "metrics:     $folder/run/metrics.json, predictions.jsonl, metrics.jsonl"
echo "pictures:    $folder/run/confusion.png, curves.png"
echo "TensorBoard: tensorboard --logdir $folder/run"
