"""Errors meant for the person at the terminal: one sentence, what is wrong, where, and what to do."""

import ctypes
import os
import signal
import sys

ACCESS = (
    "If it is a gated model, accept its licence on its Hub page and run `hf auth login`; or give the path of a local "
    "copy."
)


class BadInput(ValueError):
    """The input, the flags or a checkpoint cannot be used. Its text is all a user needs to read."""


def first_line(error: Exception) -> str:
    """What a library's error says first; the name of its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def end_with_launcher():
    """Under `accelerate launch`: be ended when the launcher is. Otherwise `kill PID` or a killed shell would leave
    training on, on GPUs that look free. Linux only."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def run(main, if_interrupted="", if_out_of_memory="Lower --batch_size or --max_new_tokens."):
    """Runs a script's `main`; turns the errors a user can mend into one line on stderr and exit status 1, with the
    script's own advice.

    Anything else keeps its traceback: that is a bug of ours, and hiding it would help nobody.
    `MEDUSA_TRACEBACK=1` shows the traceback of the others too.
    """
    try:
        main()
    except (BadInput, FloatingPointError) as error:
        if os.environ.get("MEDUSA_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted" + if_interrupted, file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells count
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, by its name: not every script needs torch
            raise
        sys.exit(f"error: out of GPU memory ({first_line(error)}). {if_out_of_memory}")
