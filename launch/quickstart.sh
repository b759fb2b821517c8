#!/usr/bin/env bash
# From nothing to a distilled student: installs, renders the embedded world, trains four stages, writes a report.
# `quickstart.sh clip_td` is CLIP-TD's: trains a CLIP, exports it, trains a student of each method, prints the table.
# Run it again after an interruption and it goes on where it stopped. Arguments go to main: --config.seed=1
source "$(dirname "$0")/setup.sh"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}
if [[ "${1:-}" != clip_td ]]; then
  workdir=${WORKDIR:-runs/quickstart}
  python -m clipdistill_jax.main --config=configs/quickstart.py --workdir="$workdir" "$@"
  exit
fi
shift
workdir=${WORKDIR:-runs/clip_td} config=configs/clip_td/world.py
python -m clipdistill_jax.main --config=$config:teacher --workdir="$workdir/teacher"
if [[ ! "$workdir/clip" -nt "$workdir/teacher/clip/result.json" ]]; then
  rm -rf "$workdir/clip"
  python -m clipdistill_jax.export --format=clip --stage="$workdir/teacher/clip" --out="$workdir/clip"
fi
students=$workdir/students
python -m clipdistill_jax.main --config=$config:all --workdir="$students" --config.clip="$workdir/clip" "$@"
python -m clipdistill_jax.report clip_td --workdir="$students"
