"""Flags of runs that compute hidden states, and of runs that read stored ones."""

ONLINE = ("--medusa_only_heads", True, "--max_steps", 6, "--save_steps", 3)
HELD_OUT = ("--eval_holdout", 8)


def offline(states) -> tuple:
    return (*ONLINE, "--data_path", None, "--model_max_length", None, "--states_path", states)


def contents(states) -> dict[str, bytes]:
    return {path.relative_to(states).as_posix(): path.read_bytes() for path in states.rglob("*") if path.is_file()}
