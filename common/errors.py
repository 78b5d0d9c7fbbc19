"""Errors meant for the person at the terminal: one sentence on what is wrong, where, and what to do."""

import ctypes
import errno
import os
import signal
import sys
import time

ACCESS = (
    "If it is a gated model, accept its licence on its Hub page and run `hf auth login`; or give the path of a local "
    "copy."
)
NO_CODE = {"trust_remote_code": False}  # said aloud: where nothing is said, transformers asks at the terminal


class BadInput(ValueError):
    """The input, the flags or a checkpoint cannot be used. The message is all a user needs to read."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error; its class if it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def end_with_launcher():
    """Under `accelerate launch`, ends this process when the launcher ends. Otherwise a `kill PID` of the launcher,
    or a killed shell, would leave training running on GPUs that look free. Linux only."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def end(sentence: str):
    """Ends the process with one line on stderr and exit status 1. Of processes that a launcher started together, the
    first says it for all: others wait a little, and the launcher ends them meanwhile. If it does not, because only
    they have failed, they say it themselves."""
    if "TORCHELASTIC_RUN_ID" in os.environ and (rank := int(os.environ.get("LOCAL_RANK", 0))):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2 * rank)
    sys.exit(f"error: {sentence}")


def run(main, if_interrupted="", if_out_of_memory="Lower --batch_size or --max_new_tokens."):
    """Runs a script's `main`. An error that the user can mend becomes one line on stderr, with the script's own
    advice, and exit status 1.

    Other errors are bugs of ours and keep their traceback. `MEDUSA_TRACEBACK=1` keeps it for BadInput and NaN too.
    """
    try:
        main()
    except (BadInput, FloatingPointError) as error:
        if os.environ.get("MEDUSA_TRACEBACK"):
            raise
        end(str(error))
    except KeyboardInterrupt:
        print("interrupted" + if_interrupted, file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells count
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        end(f"{first_line(error)}: free some space, or choose a directory elsewhere, and start again")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's. By its name, because not every script imports torch
            raise
        end(f"out of GPU memory ({first_line(error)}). {if_out_of_memory}")
