"""The flags of `train.py --plan` (training/plan.py)."""

from dataclasses import dataclass, field


@dataclass
class PlanArguments:
    plan: bool = field(
        default=False,
        metadata={
            "help": "Print what the run takes on each GPU, from config.json and the other flags alone, and stop: with "
            "an error, and what to change, if it does not fit (docs/distributed.md)."
        },
    )
    plan_gpus: int | None = field(
        default=None,
        metadata={"help": "With --plan: how many GPUs share the model (default: as many as processes run)."},
    )
    plan_gib: float | None = field(
        default=None,
        metadata={"help": "With --plan: the memory of a GPU in GiB (default: that of the one that is here)."},
    )
