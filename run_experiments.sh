#!/usr/bin/env bash
# Runs the experiments of papers/ and skips those that are recorded already.
#   ./run_experiments.sh                                  lists what there is, with the published numbers
#   ./run_experiments.sh lamaml mnist_rotations           one algorithm on one stream
#   ./run_experiments.sh all mnist_rotations --as_published    every algorithm; further options go to main.py
#   ./run_experiments.sh all                              everything
cd "$(dirname "$0")" || exit
if command -v uv >/dev/null; then python="uv run --quiet python"; else python=python3; fi
[ $# -eq 0 ] && exec $python -m utils.experiments list
commands=$($python -m utils.experiments commands "$@") || exit
failed=0
while read -r arguments; do
    [ -z "$arguments" ] && continue
    echo "main.py $arguments"
    $python main.py $arguments </dev/null || failed=$?
done <<<"$commands"
exit $failed
