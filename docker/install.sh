#!/usr/bin/env bash
# Installs the project's dependencies in the tested versions for the Python on the PATH.
# The Dockerfile runs it, and CI runs it in a clean environment.
set -euo pipefail
if [[ ${DEVICE:-} == cpu ]]; then
    export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu # torch from PyPI includes CUDA
fi
dependencies='import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]))'
python -c "$dependencies" | python -m pip install --quiet --constraint constraints.txt --requirement /dev/stdin
