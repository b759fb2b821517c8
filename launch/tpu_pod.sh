#!/usr/bin/env bash
# Runs a config on every host of a Cloud TPU slice. The same command goes on after an interruption.
#
#   TPU=my-slice ZONE=us-central2-b bash launch/tpu_pod.sh --config=configs/clipping/msrvtt.py \
#     --workdir=/mnt/shared/runs/msrvtt --config.data.source=/mnt/shared/msrvtt
#
# The workdir must lie on a disk that all hosts mount (Filestore, or a bucket through gcsfuse). PYTHON names a
# Python 3.11 to 3.13 on the hosts.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TPU:?name the slice: TPU=NAME ZONE=ZONE bash launch/tpu_pod.sh --config=FILE --workdir=DIR}" "${ZONE:?name its zone}"
tar --exclude=.venv --exclude=.git --exclude=runs -czf /tmp/clipdistill_jax.tar.gz .
gcloud compute tpus tpu-vm scp /tmp/clipdistill_jax.tar.gz "$TPU:" --zone="$ZONE" --worker=all
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  set -e
  mkdir -p clipdistill_jax && tar -xzf clipdistill_jax.tar.gz -C clipdistill_jax && cd clipdistill_jax
  export EXTRAS=tpu PYTHON=${PYTHON:-python3}
  source launch/setup.sh
  exec python -m clipdistill_jax.main $(printf '%q ' "$@")"
