"""A run's identity: which checkpoint it resumes, and what must be the same there and on all ranks."""

import hashlib
import logging
import os
import re
import shutil
from datetime import date as Date
from datetime import datetime, timezone
from pathlib import Path

from accelerate.utils import gather_object
from transformers.trainer_utils import SchedulerType

from common import provenance
from common.errors import BadInput
from common.files import read_json
from model.adapter import WEIGHTS
from model.heads_file import HEADS_DIR, HEADS_FILE
from training.checkpoints import INCOMPLETE, RUN_FILE, read_run
from training.lora_arguments import NAMES as LORA
from training.optimiser import optim_name
from training.states import StoredRows
from training.vocabulary import arrow_columns

logger = logging.getLogger(__name__)

# The version of the order in which conversations.batches.ShuffledSampler draws rows. A checkpoint from the middle of
# an epoch goes on in the order it began with, or rows would be drawn twice or never.
ROW_ORDER = 2

NAME = re.compile(r"checkpoint-\d+")  # checkpoint-4-bad is somebody's own

# Flags that may change when a run is resumed, and hold from there on.
APPLIED = (
    *("learning_rate", "medusa_lr_multiplier", "weight_decay", "max_grad_norm", "warmup_steps", "max_steps"),
    *("num_train_epochs", "medusa_heads_coefficient", "medusa_decay_coefficient", "medusa_scheduler"),
)

RESULTS = (HEADS_FILE, HEADS_DIR, WEIGHTS, "config.json", "model.safetensors", "model.safetensors.index.json")


def describe(model_args, data_args, training_args) -> dict:
    """What run.json says of a run, except for its data. A run that resumes a checkpoint must have the same."""
    base = model_args.model_name_or_path
    return {
        "medusa_num_heads": model_args.num_heads,
        "medusa_num_layers": model_args.medusa_num_layers,
        "medusa_head_type": model_args.medusa_head_type,
        "medusa_rank": model_args.medusa_rank,
        "medusa_prefix_layer": model_args.medusa_prefix_layer,
        "medusa_only_heads": training_args.medusa_only_heads,
        "medusa_loss": training_args.medusa_loss,
        "medusa_rows": training_args.medusa_rows,
        "medusa_vocab_size": model_args.medusa_vocab_size,
        "model_name_or_path": os.path.abspath(base) if os.path.isdir(base) else base,
        "batch": training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size,
        "seed": training_args.seed,
        "data_seed": training_args.seed if training_args.data_seed is None else training_args.data_seed,
        "train_sampling_strategy": str(training_args.train_sampling_strategy),
        "packing": data_args.packing,
        "lazy_preprocess": data_args.lazy_preprocess,
        "optim": optim_name(training_args),
        "lr_scheduler_type": SchedulerType(training_args.lr_scheduler_type).value,
        "backbone_dtype": training_args.bits,
        **{name: getattr(training_args, name) for name in LORA},
    }


def tell_changes(found: dict, training_args):
    """Logs each flag that holds from here on with another value than the checkpoint's run had."""
    for name, before in found.get("applied", {}).items():
        if (now := getattr(training_args, name)) != before:
            logger.info("--%s is %s from here on, and was %s", name, now, before)


def check_step(checkpoint: Path):
    """Raises BadInput if a checkpoint is not named after its step: it was renamed, and its order is not known."""
    step = read_json(checkpoint / "trainer_state.json").get("global_step")
    if checkpoint.name != f"checkpoint-{step}":
        raise BadInput(f"{checkpoint} is of step {step}: it was renamed, so call it checkpoint-{step} again")


def find_checkpoint(model_args, data_args, training_args) -> Path | None:
    """The checkpoint to resume from, or None for a new run. Raises BadInput if a new run would overwrite an earlier
    one, or if the checkpoint is not complete, not the newest, or of another kind of run."""
    output_dir, resume = Path(training_args.output_dir), training_args.resume_from_checkpoint
    checkpoints = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    checkpoints.sort(key=lambda path: int(path.name.split("-")[1]))
    for path in output_dir.glob(f"{INCOMPLETE}*"):
        logger.info("%s was being written when a run ended, and is ignored", path)
    if str(resume).lower() in ("none", "false"):
        left = [output_dir / name for name in RESULTS if (output_dir / name).exists()] + checkpoints
        if left:
            raise BadInput(
                f"{output_dir} already holds {left[-1].name} of an earlier run: go on from its last checkpoint with "
                "--resume_from_checkpoint True, or choose another --output_dir"
            )
        return None
    if str(resume).lower() == "true":
        checkpoint = newest(checkpoints, output_dir)
        check_step(checkpoint)
    else:
        checkpoint = Path(resume)
        check_is_newest(checkpoint, checkpoints, output_dir)
    found = read_json(checkpoint / RUN_FILE)
    check_same_run(checkpoint, found, describe(model_args, data_args, training_args))
    tell_changes(found, training_args)
    logger.info("resuming from %s", checkpoint)
    return checkpoint


def newest(checkpoints: list[Path], output_dir: Path) -> Path:
    """The last complete checkpoint."""
    for checkpoint in reversed(checkpoints):
        if read_run(checkpoint) is not None:
            return checkpoint
        logger.info("%s is not complete and is ignored", checkpoint)
    raise BadInput(f"--resume_from_checkpoint True: there is no complete checkpoint in {output_dir}")


def check_is_newest(checkpoint: Path, checkpoints: list[Path], output_dir: Path):
    """Raises BadInput if the checkpoint that the user named is not complete, or not the last of this output_dir."""
    if not checkpoint.is_dir():
        raise BadInput(f"--resume_from_checkpoint {checkpoint}: there is no such directory")
    if read_run(checkpoint) is None:
        raise BadInput(f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint")
    if checkpoint.resolve().parent != output_dir.resolve():
        raise BadInput(f"{checkpoint} is another run's: resume with --output_dir {checkpoint.parent}")
    check_step(checkpoint)
    if checkpoint.name != checkpoints[-1].name:
        raise BadInput(
            f"{output_dir} has {checkpoints[-1].name}, later than {checkpoint.name}: move the later ones away "
            "first, or the next resume would go on from them"
        )


def check_same_run(checkpoint: Path, found: dict, asked: dict):
    """Raises BadInput if the run of the checkpoint (`found`, its run.json) is not the run that the flags ask for."""
    # Older checkpoints do not say the first four; the others are only said if there are such.
    older = {"medusa_loss": "ce", "medusa_rows": "answers", "medusa_head_type": "medusa", "medusa_prefix_layer": False}
    found = older | dict.fromkeys(("medusa_vocab_size", "medusa_rank", *LORA)) | found
    old = [key for key in ("batch", "data", "save_only_model", "model_name_or_path") if key not in found]
    if old:
        raise BadInput(f"{checkpoint / RUN_FILE} does not say {old[0]}: it is of another version, or was edited")
    for key, value in asked.items():
        if key not in found:  # a checkpoint of a version before this key: `identity` compares the data
            continue
        if key == "batch" and found[key] != value:
            raise BadInput(
                f"{checkpoint} was trained with {found[key]} conversations in an optimiser step, not {value}: choose "
                "processes x --per_device_train_batch_size x --gradient_accumulation_steps to give that"
            )
        if found[key] != value:
            raise BadInput(
                f"{checkpoint} was trained with --{key} {found[key]}, not {value}: use the same, or another "
                "--output_dir"
            )
    if found["save_only_model"]:
        raise BadInput(f"{checkpoint} was saved with --save_only_model: without Adam's moments it cannot be resumed")


def first_day(checkpoint: Path | None) -> Date:
    """The day on which the run began, the same on all ranks: what a chat template prints if it asks for the date. So a
    run that is resumed on another day has the same data."""
    began = read_json(checkpoint / RUN_FILE).get("date") if checkpoint else None  # older versions did not write it
    return gather_object([Date.fromisoformat(began) if began else Date.today()])[0]


def identity(model_args, data_args, training_args, checkpoint: Path | None, date: Date, train_data, eval_data) -> dict:
    """run.json of this run. Raises BadInput on every rank if the ranks differ in data or checkpoint, or if the
    checkpoint was trained on other data."""
    data, eval_digest = digest(train_data, ROW_ORDER), digest(eval_data) if eval_data else ""
    same = {"training set": data, "evaluation set": eval_digest, "checkpoint to resume from": str(checkpoint)}
    check_ranks(training_args, **same)
    if checkpoint is not None and read_json(checkpoint / RUN_FILE)["data"] != data:
        raise BadInput(
            f"{checkpoint} was trained on other data, data cut otherwise, or by a version that drew its rows in "
            "another order: resume with that version and the same --data_path, --model_max_length, --packing, "
            "--eval_holdout and chat template, or the same --states_path"
        )
    said = {key: value for key, value in describe(model_args, data_args, training_args).items() if value is not None}
    said |= {"applied": {name: getattr(training_args, name) for name in APPLIED}}
    return said | {"data": data, "date": date.isoformat()}


def digest(dataset, order: int | None = None) -> str:
    """A hash of the data: all lengths, tokens and labels, and where packed rows begin anew; of stored states their
    checksums, which are of the same. Data that is tokenised when it is drawn: the number of rows, and about 64 of
    them. order: of the rows, if it matters."""
    found = hashlib.sha256(f"{len(dataset)} {order}".encode())
    if isinstance(dataset, StoredRows):
        found.update(dataset.checksum.encode())
    elif "labels" in dataset.column_names:
        for numbers in arrow_columns(dataset, *sorted(dataset.column_names)):
            found.update(numbers.tobytes())
    else:
        for i in range(0, len(dataset), max(1, len(dataset) // 64)):
            row = dataset[i]
            found.update(str([[int(number) for number in row[key]] for key in ("input_ids", "labels")]).encode())
    return found.hexdigest()


def check_same(**same):
    """Raises BadInput on every rank if one differs from rank 0 in a value of `same`."""
    ranks = gather_object([same])
    for name in same:
        different = [rank for rank, other in enumerate(ranks) if other[name] != ranks[0][name]]
        if different:
            raise BadInput(
                f"rank {different[0]} has another {name} than rank 0: start all with the same files and flags"
            )


def check_ranks(training_args, **same: str):
    """Raises BadInput on every rank if one differs from rank 0 in a value of `same`, or does not see rank 0's output
    directory. Each rank trains on its share of the same rows and writes its part of the same checkpoint."""
    check_same(**same)
    if training_args.world_size == 1:
        return
    probe = Path(training_args.output_dir, f"{INCOMPLETE}probe")
    if training_args.process_index == 0:
        probe.mkdir(parents=True, exist_ok=True)
    training_args.distributed_state.wait_for_everyone()
    blind = [rank for rank, sees in enumerate(gather_object([probe.is_dir()])) if not sees]
    if training_args.process_index == 0:
        probe.rmdir()
    if blind:
        raise BadInput(
            f"rank {blind[0]} does not see the directory {probe.parent} of rank 0: several nodes need an --output_dir "
            "that they share"
        )


def begin(training_args, where: str):
    """On rank 0, before the first step: deletes what a killed run was writing, and writes train_command.txt, which
    says how the weights next to it were made. where: how the processes are arranged, such as FSDP2."""
    if training_args.process_index > 0:
        return
    output_dir = Path(training_args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for left in output_dir.glob(f"{INCOMPLETE}*"):
        shutil.rmtree(left)
    lines = (
        provenance.command(),
        f"date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"commit: {provenance.commit()}",
        f"versions: {provenance.versions()}",
        f"GPU: {provenance.gpu()} (processes: {training_args.world_size}, {where})",
    )
    (output_dir / "train_command.txt").write_text("\n".join(lines) + "\n")
