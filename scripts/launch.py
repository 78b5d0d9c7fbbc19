"""`accelerate launch`, whose processes have the last word: no traceback of the launcher follows theirs.

    python scripts/launch.py --config_file configs/fsdp2.yaml --num_processes 8 train.py ...

A process that fails has said why, in a sentence or a traceback of its own. One that a signal ended has not.
"""

import logging
import signal
import sys

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def end(error: ChildFailedError):
    """Ends with the exit status of the process that failed first; 128 + the signal's number, as shells count."""
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        killed = " (out of memory is a common reason)" if name == "SIGKILL" else ""
        print(f"error: rank {rank} was ended by {name}{killed}, and the others with it", file=sys.stderr)
    sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # of this process alone: what torch's launcher has to say of exit codes
    try:
        main()
    except ChildFailedError as error:
        end(error)
