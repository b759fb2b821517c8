#!/usr/bin/env bash
# From nothing to a distilled student: installs, renders the embedded world, trains four stages, writes a report.
# Run it again after an interruption and it goes on where it stopped. Arguments go to main: --config.seed=1
source "$(dirname "$0")/setup.sh"
workdir=${WORKDIR:-runs/quickstart}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}
python -m clipdistill_jax.main --config=configs/quickstart.py --workdir="$workdir" "$@"
