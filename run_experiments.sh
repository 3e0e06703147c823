#!/usr/bin/env bash
# Runs the experiments of papers/ and skips those that are recorded already.
#   ./run_experiments.sh                                       lists what there is, with the published numbers
#   ./run_experiments.sh lamaml mnist_rotations                one algorithm on one stream
#   ./run_experiments.sh all mnist_rotations --as_published    every algorithm; further options go to main.py
#   ./run_experiments.sh all                                   everything
cd "$(dirname "$0")" || exit
if command -v uv >/dev/null; then exec uv run --quiet python -m utils.experiments "$@"; fi
exec python3 -m utils.experiments "$@"
