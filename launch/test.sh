#!/usr/bin/env bash
# Installs what the tests need, lints, type-checks and runs the whole suite. Arguments go to pytest: -k checkpoint
EXTRAS=${EXTRAS:-test}
source "$(dirname "$0")/setup.sh"
export JAX_PLATFORMS=cpu
ruff check .
ruff format --check .
mypy
python -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder -rs "$@"
