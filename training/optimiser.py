"""The optimiser that --optim names, and its parameter groups."""

from collections.abc import Callable

from torch import nn
from transformers.training_args import OptimizerNames

from common.errors import BadInput


def optimiser_class(args, sharded: bool, of_trainer: Callable[[], tuple]) -> tuple:
    """-> class and keyword arguments, as the Trainer's `get_optimizer_cls_and_kwargs` gives them. sharded: under FSDP.
    Raises BadInput for an optimiser that is not installed, has wrong --optim_args or cannot work here."""
    optim = OptimizerNames(args.optim).value
    try:
        cls, kwargs = of_trainer()
    except ImportError as error:
        raise BadInput(f"--optim {optim} needs a package that is missing: {error}") from error
    except ValueError as error:
        raise BadInput(f"--optim_args {args.optim_args} are not name=value,name=value: {error}") from error
    if kwargs.keys() & {"params", "model", "optimizer_dict"}:
        raise BadInput(f"--optim {optim} makes its own parameter groups: choose an AdamW, Adafactor or SGD")
    if sharded and optim == "adafactor":
        raise BadInput(f"--optim {optim} cannot work on FSDP's shards of a weight: choose an AdamW or SGD")
    return cls, kwargs


def groups(args, model: nn.Module, decays: set[str]) -> list[dict]:
    """Up to four parameter groups: heads or backbone, with or without weight decay; no frozen weights. decays: names
    of the parameters that decay."""
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(("backbone." not in name, name in decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": args.learning_rate * (args.medusa_lr_multiplier if is_head else 1.0),
            "weight_decay": args.weight_decay if decay else 0.0,
        }
        for (is_head, decay), parameters in found.items()
    ]
