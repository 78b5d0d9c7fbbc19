#!/bin/sh
# Sets up and passes the tests on a machine without a GPU: lint, shell scripts, every test that needs no GPU.
#   bash scripts/test.sh                     all of it (where there is a GPU, its tests too)
#   bash scripts/test.sh tests/test_loss.py  what pytest is given
set -eu
cd "$(dirname "$0")/.."
. scripts/setup.sh
"$PY" -m ruff check .
"$PY" -m ruff format --check .
PATH="$(dirname "$PY"):$PATH" shellcheck --external-sources scripts/*.sh .ci/run
exec "$PY" -m pytest "$@"
