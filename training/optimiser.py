"""The optimiser that --optim names, and its parameter groups."""

from collections.abc import Callable

from torch import nn
from transformers.training_args import OptimizerNames

from common.errors import BadInput
from training.fsdp import is_version_1
from training.muon import MuonAndAdamW, resblock_matrices


def optimiser_class(args, sharded: bool, of_trainer: Callable[[], tuple]) -> tuple:
    """-> class and keyword arguments, as the Trainer's `get_optimizer_cls_and_kwargs` gives them. sharded: under FSDP.
    Raises BadInput for an optimiser that is not installed, has wrong --optim_args or cannot work here."""
    optim = optim_name(args)
    try:
        cls, kwargs = of_trainer()
    except ImportError as error:
        raise BadInput(f"--optim {optim} needs a package that is missing: {error}") from error
    except ValueError as error:
        raise BadInput(f"--optim_args {args.optim_args} are not name=value,name=value: {error}") from error
    if args.muon:
        if args.optim_args:
            raise BadInput(f"--optim_args {args.optim_args}: --optim muon takes none")
        cls = MuonAndAdamW
    if kwargs.keys() & {"params", "model", "optimizer_dict"}:
        raise BadInput(f"--optim {optim} makes its own parameter groups: choose an AdamW, Adafactor or SGD")
    if sharded and (optim == "adafactor" or cls.__module__.startswith("bitsandbytes")):
        raise BadInput(
            f"--optim {optim} cannot work on FSDP's shards of a weight: choose an AdamW (in 8 bits adamw_torch_8bit), "
            "muon or SGD"
        )
    if sharded and is_version_1() and (args.muon or cls.__module__.startswith("torchao")):
        raise BadInput(f"--optim {optim} needs FSDP2: FSDP1 makes one flat weight of a head's")
    return cls, kwargs


def optim_name(args) -> str:
    """The value of --optim."""
    return "muon" if args.muon else OptimizerNames(args.optim).value


def groups(args, model: nn.Module, decays: set[str]) -> list[dict]:
    """Up to four parameter groups: heads or backbone, with or without weight decay; no frozen weights. With --optim
    muon one more, of what Muon takes. decays: names of the parameters that decay. Raises BadInput if that is none."""
    found: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    matrices = resblock_matrices(model) if args.muon else set()
    if args.muon and not matrices:
        raise BadInput("--optim muon is for the matrices of ResBlocks, and these heads have none")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = ("backbone." not in name, name in decays, id(parameter) in matrices)
            found.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": args.learning_rate * (args.medusa_lr_multiplier if is_head else 1.0),
            "weight_decay": args.weight_decay if decay else 0.0,
            **({"muon": is_muon} if args.muon else {}),
        }
        for (is_head, decay, is_muon), parameters in found.items()
    ]
