#!/bin/sh
# Sourced by the other scripts from the top directory: makes .venv with the pinned requirements, once, and sets $PY.
#   PYTHON=python3.12    the interpreter to make it with
#   VENV=/some/place     where (default .venv)
#   VENV=none            no virtual environment: use the python3 that is active, with whatever it has
[ -t 2 ] || export TQDM_DISABLE=1 # a progress bar in a file or a pipe is half a line for each of its updates
VENV="${VENV:-.venv}"
if [ "$VENV" = none ]; then
    PY="${PYTHON:-python3}"
else
    PY="$VENV/bin/python"
    wanted=$(cat requirements*.txt | cksum)
    if [ "$(cat "$VENV/.installed" 2>/dev/null)" != "$wanted" ]; then
        echo "setting up $VENV (once; a few minutes) ..."
        "${PYTHON:-python3}" -m venv "$VENV"
        "$PY" -m pip install --quiet --requirement requirements-dev.txt
        "$PY" -m pip install --quiet --no-deps --requirement requirements-quickstart.txt
        echo "$wanted" >"$VENV/.installed"
    fi
fi
