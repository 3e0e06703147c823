#!/usr/bin/env bash
# Puts TinyImageNet into data/. Options go to get_data.py, such as --source FOLDER or --data_path FOLDER.
cd "$(dirname "$0")" || exit
if command -v uv >/dev/null; then exec uv run --quiet get_data.py tinyimagenet "$@"; fi
exec python3 get_data.py tinyimagenet "$@"
