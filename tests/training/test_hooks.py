"""training/hooks.py: the Trainer still has the private methods that are overridden, and they stand in one place."""

import inspect

import pytest
from transformers import Trainer

from training.checkpoints import CheckpointingTrainer
from training.hooks import HookedTrainer
from training.trainer import MedusaTrainer

# What transformers calls them with: 5.17 and 5.23 agree. Another release may not: then look at hooks.py anew.
SIGNATURES = {
    "_prepare_inputs": ["inputs"],
    "_get_train_sampler": ["train_dataset"],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_run_epoch": [
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ],
    "_save_checkpoint": ["model", "trial"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_load_rng_state": ["checkpoint"],
    "_load_best_model": [],
}
CALLED = {"_save_rng_state": ["output_dir"]}


def parameters(function) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}


@pytest.mark.parametrize("name", [*SIGNATURES, *CALLED])
def test_the_trainer_has_it_with_this_signature(name):
    assert list(parameters(getattr(Trainer, name))) == (SIGNATURES | CALLED)[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_ours_can_be_called_like_the_trainer_s(name):
    """By position or by name, as the Trainer's own signature allows."""
    ours, theirs = parameters(getattr(HookedTrainer, name)), parameters(getattr(Trainer, name))
    if any(p.kind is p.VAR_KEYWORD for p in ours.values()):
        assert not any(p.kind is p.POSITIONAL_ONLY for p in theirs.values())
        inspect.signature(getattr(HookedTrainer, name)).bind(None, **dict.fromkeys(theirs))
        return
    assert list(ours) == list(theirs)
    optional = [name for name, p in theirs.items() if p.default is not p.empty]
    assert [name for name, p in ours.items() if p.default is not p.empty] == optional


def test_nothing_private_is_overridden_elsewhere():
    private = {name for name in dir(Trainer) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in vars(HookedTrainer) if name in private} == SIGNATURES.keys()
    for cls in (CheckpointingTrainer, MedusaTrainer):
        assert not private & vars(cls).keys(), cls


def test_every_hook_is_defined():
    hooks = [name for name, value in vars(HookedTrainer).items() if inspect.isfunction(value) and name[0] != "_"]
    undefined = [name for name in hooks if getattr(MedusaTrainer, name) is getattr(HookedTrainer, name)]
    assert undefined == ["save_rng_state"]  # which calls the Trainer's
