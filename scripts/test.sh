#!/bin/sh
# Sets up and passes the tests on a machine without a GPU: lint, types, shell scripts, every test that needs no GPU.
#   bash scripts/test.sh                     all of it, about 8 minutes (where there is a GPU, its tests too)
#   bash scripts/test.sh --fast              for the loop while editing: without what takes long (see CONTRIBUTING.md)
#   bash scripts/test.sh --lint              lint and types only: what a commit hook runs
#   bash scripts/test.sh tests/model         what pytest is given
set -eu
cd "$(dirname "$0")/.."
. scripts/setup.sh
"$PY" -m ruff check .
"$PY" -m ruff format --check .
PATH="$(dirname "$PY"):$PATH" shellcheck --external-sources scripts/*.sh .ci/run
"$PY" -m mypy
on_both_cores() { "$PY" -m pytest -n 2 --dist loadgroup "$@"; } # not one a core: a worker takes 2 GB
case "${1:-}" in
    --lint) ;;
    --fast)
        shift
        on_both_cores -m "not gpu and not interpreter and not processes and not slow" "$@"
        ;;
    "") on_both_cores ;;
    *) "$PY" -m pytest "$@" ;;
esac
