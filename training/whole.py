"""A checkpoint of stage 2 as a model: its weights lie in shards, one file a process (training/state.py)."""

from pathlib import Path

from common.errors import BadInput
from medusa_model import MedusaConfig, MedusaModel
from model.backbone import load_backbone
from training.build import adapt
from training.checkpoints import RUN_FILE, STATE_DIR, read_run
from training.lora_arguments import NAMES, LoraArguments
from training.state import load_state, saved_dtype, saved_token_map


def is_checkpoint(directory) -> bool:
    """Whether it is a checkpoint of stage 2: stage 1's hold a heads file, and are read as any heads."""
    run = read_run(Path(directory))
    return run is not None and run.get("medusa_only_heads") is False


def model_of(directory, base_model: str | None = None) -> MedusaModel:
    """The trained backbone and heads, on the CPU, in the dtype of their training. base_model: the model that the run
    began with, if it has moved. Raises BadInput if the checkpoint is damaged, or of another model."""
    checkpoint = Path(directory)
    run = read_run(checkpoint)
    if run is None:
        raise BadInput(f"{checkpoint} is no whole checkpoint: no {RUN_FILE} or trainer_state.json")
    name = base_model or run["model_name_or_path"]
    size = run.get("medusa_vocab_size")
    token_map = None if size is None else saved_token_map(checkpoint / STATE_DIR, size)
    kind = {key: run[key] for key in ("medusa_num_heads", "medusa_num_layers", "medusa_head_type")}
    kind |= {key: run[key] for key in ("medusa_rank", "medusa_prefix_layer") if run.get(key) is not None}
    backbone = load_backbone(name, dtype=saved_dtype(checkpoint / STATE_DIR))
    model = MedusaModel.from_backbone(backbone, MedusaConfig(**kind), token_map=token_map)
    if run.get("lora_rank"):
        adapt(model, LoraArguments(**{name: run.get(name) for name in NAMES}))
    load_state(checkpoint / STATE_DIR, model, None, weights=True)
    return model.eval()
