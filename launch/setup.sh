# Sourced by the other scripts: makes .venv from the pinned versions, once. EXTRAS names the extras to install.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
  echo "error: $("$PYTHON" --version) found, 3.11 to 3.13 needed; set PYTHON=/path/to/python3.11" >&2
  exit 1
}
stamp=.venv/installed
wanted="$(cat pyproject.toml launch/constraints.txt) ${EXTRAS:-}"
if [[ "$(cat $stamp 2>/dev/null)" != "$wanted" ]]; then
  echo "installing into .venv (once; about two minutes)"
  "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
    --constraint launch/constraints.txt --editable ".${EXTRAS:+[$EXTRAS]}"
  echo "$wanted" > $stamp
fi
source .venv/bin/activate
