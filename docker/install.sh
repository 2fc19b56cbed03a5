#!/usr/bin/env bash
# Installs the project's dependencies, in the versions that were tested, for the Python on the path.
# The image is made by this, and CI runs it in an environment of its own.
set -euo pipefail
if [[ ${DEVICE:-} == cpu ]]; then
    export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu # PyPI's torch brings CUDA along
fi
dependencies='import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]))'
python -c "$dependencies" | python -m pip install --quiet --constraint constraints.txt --requirement /dev/stdin
