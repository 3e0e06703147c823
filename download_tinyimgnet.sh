#!/usr/bin/env bash
# Fetches TinyImageNet into data/. Arguments are get_data.py's, such as --source FOLDER.
cd "$(dirname "$0")" || exit
exec python3 get_data.py tinyimagenet "$@"
