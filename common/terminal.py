"""What a person sees while a script runs: log lines, progress bars, tables."""

import logging
import os
import sys


def start():
    """Plain log lines, from the first process of a group only (warnings from all). Progress bars only on a terminal:
    in a file or a pipe every update would add half a line."""
    first = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    # Liger lists each back end that is not installed, and each model it is put into: nobody has to act on either.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        if datasets := sys.modules.get("datasets"):  # not imported here: some scripts do without
            datasets.disable_progress_bars()
        if transformers := sys.modules.get("transformers"):
            transformers.utils.logging.disable_progress_bar()


def markdown(rows: list[dict]) -> str:
    """A Markdown table; its columns are the keys of the first row."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(rows[0]), ["---"] * len(rows[0]), *cells])
