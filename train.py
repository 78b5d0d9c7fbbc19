"""Trains Medusa heads on conversations: stage 1 (backbone frozen) or stage 2 (everything).

    python train.py --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct --data_path chats.jsonl \
        --output_dir out/heads --medusa_only_heads True --bf16 True --learning_rate 1e-3

scripts/llama3_8b_medusa.sh is the same with settings that suit an 8B model; arguments.py has every flag.
"""

import hashlib
import logging
import os
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
from accelerate.utils import gather_object

import errors
import provenance
from arguments import parse
from backbone import empty_backbone, load_backbone, load_backbone_config
from batches import Collator
from callback import EfficiencyCallback, FlopCount, peak_process_gib
from chat_data import load_conversations, load_tokenizer, prepare, split_conversations
from errors import BadInput
from medusa_checkpoint import HEADS_DIR, HEADS_FILE, find_heads, load_config, load_heads
from medusa_fsdp import reads_weights
from medusa_model import MedusaConfig, MedusaModel
from medusa_trainer import MedusaTrainer
from training_state import INCOMPLETE, read_run

logger = logging.getLogger(__name__)


def build_datasets(model_args, data_args, training_args, tokenizer):
    """-> (train, eval or None), tokenised."""
    cache_dir = training_args.cache_dir
    eval_data = load_conversations(data_args.eval_data_path, cache_dir) if data_args.eval_data_path else None
    train_data = load_conversations(data_args.data_path, cache_dir)
    train_data, eval_data = split_conversations(train_data, eval_data, data_args.eval_holdout)
    lengths = {
        "max_length": data_args.model_max_length,
        "min_length": (model_args.medusa_num_heads if model_args.medusa_return else 0) + 2,
    }
    train_data = prepare(
        train_data,
        data_args.data_path,
        tokenizer,
        lazy=data_args.lazy_preprocess,
        packing=data_args.packing,
        **lengths,
    )
    if eval_data is not None:
        name = data_args.eval_data_path or "the held-out part"
        eval_data = prepare(eval_data, name, tokenizer, by_length=True, **lengths)
    logger.info("%d rows to train on, %d to evaluate on", len(train_data), len(eval_data or []))
    return train_data, eval_data


def build_model(model_args, data_args, training_args, tokenizer, heads_dir: Path | None) -> MedusaModel:
    """heads_dir: where trained heads to start from are, or None for untrained ones."""
    trainable = getattr(torch, model_args.dtype)
    frozen = torch.bfloat16 if training_args.bf16 else torch.float32
    where = {"cache_dir": training_args.cache_dir, "trust_remote_code": model_args.trust_remote_code}
    config = load_backbone_config(model_args.model_name_or_path, **where)
    reads = reads_weights(config, training_args)
    dtype = frozen if training_args.medusa_only_heads else trainable
    if reads:
        backbone = load_backbone(model_args.model_name_or_path, dtype=dtype, **where)
    else:
        backbone = empty_backbone(config, dtype, model_args.trust_remote_code)
    config = backbone.config.get_text_config()
    vocab_size = backbone.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocab_size:
        raise BadInput(
            f"the tokenizer has {len(tokenizer)} tokens, but {model_args.model_name_or_path} has embeddings for "
            f"{vocab_size}: it is another model's tokenizer"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and data_args.model_max_length > positions:
        raise BadInput(f"--model_max_length {data_args.model_max_length}: the backbone knows {positions} positions")
    model = MedusaModel.from_backbone(
        backbone,
        MedusaConfig(
            medusa_num_heads=model_args.medusa_num_heads if model_args.medusa_return else 0,
            medusa_num_layers=model_args.medusa_num_layers,
        ),
        dtype=trainable,
        fill=reads,
    )
    if heads_dir is not None:
        fields = load_config(heads_dir)
        for key in ("medusa_num_heads", "medusa_num_layers", "hidden_size", "vocab_size"):
            if fields[key] != getattr(model.config, key):
                raise BadInput(f"the heads in {heads_dir} have {key} {fields[key]}, not {getattr(model.config, key)}")
        if reads:
            model.medusa_heads.load_state_dict(load_heads(heads_dir)[1], strict=True)
        logger.info("starting from the heads in %s", heads_dir)
    if training_args.medusa_only_heads:
        model.freeze_backbone()
    if training_args.fp8_backbone:
        from fp8 import use_fp8  # not above: it needs Triton

        use_fp8(backbone, training_args.device)
    model.choose_kernels(model_args.use_liger, training_args.device)
    return model


def describe_run(model_args, training_args) -> dict:
    """What a checkpoint and the run that goes on from it must have in common."""
    base = model_args.model_name_or_path
    return {
        "medusa_num_heads": model_args.medusa_num_heads if model_args.medusa_return else 0,
        "medusa_num_layers": model_args.medusa_num_layers,
        "medusa_only_heads": training_args.medusa_only_heads,
        "model_name_or_path": os.path.abspath(base) if os.path.isdir(base) else base,
        "batch": training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size,
    }


def find_checkpoint(model_args, training_args) -> Path | None:
    """The checkpoint to resume from, or None. Refuses to write over what another run left behind."""
    output_dir, resume = Path(training_args.output_dir), training_args.resume_from_checkpoint
    checkpoints = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    checkpoints.sort(key=lambda path: int(path.name.split("-")[1]))
    for path in output_dir.glob(f"{INCOMPLETE}*"):
        logger.info("%s was being written when a run ended, and is ignored", path)
    if str(resume).lower() in ("none", "false"):
        names = (HEADS_FILE, HEADS_DIR, "config.json", "model.safetensors", "model.safetensors.index.json")
        left = [output_dir / name for name in names if (output_dir / name).exists()] + checkpoints
        if left:
            raise BadInput(
                f"{output_dir} already holds {left[-1].name} of an earlier run: go on from its last checkpoint with "
                "--resume_from_checkpoint True, or choose another --output_dir"
            )
        return None
    if str(resume).lower() == "true":
        for checkpoint in reversed(checkpoints):
            if (found := read_run(checkpoint)) is not None:
                break
            logger.info("%s is not complete and is ignored", checkpoint)
        else:
            raise BadInput(f"--resume_from_checkpoint True: there is no complete checkpoint in {output_dir}")
    else:
        checkpoint = Path(resume)
        if not checkpoint.is_dir():
            raise BadInput(f"--resume_from_checkpoint {checkpoint}: there is no such directory")
        if (found := read_run(checkpoint)) is None:
            raise BadInput(f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint")
        if checkpoint.resolve().parent != output_dir.resolve():
            raise BadInput(f"{checkpoint} is another run's: resume with --output_dir {checkpoint.parent}")
        if checkpoint.name != checkpoints[-1].name:
            raise BadInput(
                f"{output_dir} has {checkpoints[-1].name}, later than {checkpoint.name}: move the later ones away "
                "first, or the next resume would go on from them"
            )
    asked = describe_run(model_args, training_args)
    for key, value in asked.items():
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
    logger.info("resuming from %s", checkpoint)
    return checkpoint


def digest(dataset) -> str:
    """A number that changes with the data: rows, all lengths where they are known, and 64 rows token by token."""
    found = hashlib.sha256(str(len(dataset)).encode())
    if "length" in (getattr(dataset, "column_names", None) or []):
        found.update(str(list(dataset["length"])).encode())
    for i in range(0, len(dataset), max(1, len(dataset) // 64)):
        row = dataset[i]
        found.update(str([[int(number) for number in row[key]] for key in ("input_ids", "labels")]).encode())
    return found.hexdigest()


def check_ranks(training_args, **same: str):
    """Raises BadInput on every rank if one has something else under a name of `same` than rank 0, or does not see
    rank 0's output directory: each trains on its share of the same rows, and writes its part of one checkpoint."""
    ranks = gather_object([same])
    for name in same:
        different = [rank for rank, other in enumerate(ranks) if other[name] != ranks[0][name]]
        if different:
            raise BadInput(
                f"rank {different[0]} has another {name} than rank 0: start all with the same files and flags"
            )
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


def write_command(training_args, where: str):
    """train_command.txt: what made the weights beside it."""
    lines = (
        provenance.command(),
        f"date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"commit: {provenance.commit()}",
        f"versions: {provenance.versions()}",
        f"GPU: {provenance.gpu()} (processes: {training_args.world_size}, {where})",
    )
    os.makedirs(training_args.output_dir, exist_ok=True)
    Path(training_args.output_dir, "train_command.txt").write_text("\n".join(lines) + "\n")


def main():
    first = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    model_args, data_args, training_args = parse(sys.argv[1:])
    checkpoint = find_checkpoint(model_args, training_args)
    tokenizer = load_tokenizer(
        model_args.model_name_or_path,
        model_args.chat_template,
        cache_dir=training_args.cache_dir,
        trust_remote_code=model_args.trust_remote_code,
    )
    with training_args.main_process_first(desc="tokenising"):  # the other processes then read its cache
        train_data, eval_data = build_datasets(model_args, data_args, training_args, tokenizer)
    data, eval_digest = digest(train_data), digest(eval_data) if eval_data else ""
    same = {"training set": data, "evaluation set": eval_digest, "checkpoint to resume from": str(checkpoint)}
    check_ranks(training_args, **same)
    if checkpoint is not None and read_run(checkpoint)["data"] != data:
        raise BadInput(
            f"{checkpoint} was trained on other data, or data cut otherwise: resume with the same --data_path, "
            "--model_max_length, --packing and --eval_holdout"
        )
    heads_dir = None
    if checkpoint is not None and training_args.medusa_only_heads:
        heads_dir = checkpoint
    elif checkpoint is None and model_args.medusa_heads_path is not None:
        heads_dir = find_heads(model_args.medusa_heads_path)[0]
    model = build_model(model_args, data_args, training_args, tokenizer, heads_dir)
    memory = [f"{gib:.1f}" for gib in gather_object([peak_process_gib()])]
    logger.info("the model is built; each process had at most %s GiB of CPU memory", ", ".join(memory))

    trainer = MedusaTrainer(
        model=model,
        args=training_args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=Collator(pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0),
        processing_class=tokenizer,
        meter=EfficiencyCallback(FlopCount.of(model), training_args.device, world_size=training_args.world_size),
        run=describe_run(model_args, training_args) | {"data": data},
    )
    if trainer.is_world_process_zero():
        write_command(training_args, trainer.where)
        for left in Path(training_args.output_dir).glob(f"{INCOMPLETE}*"):  # by a run that was killed
            shutil.rmtree(left)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model()
    if eval_data is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_state()
    logger.info("saved to %s", training_args.output_dir)


ADVICE = {
    "if_interrupted": ": go on from the last checkpoint with --resume_from_checkpoint True",
    "if_out_of_memory": "Lower --per_device_train_batch_size (and raise --gradient_accumulation_steps by as much), "
    "--model_max_length or --medusa_num_heads; in stage 2 add --gradient_checkpointing True.",
}

if __name__ == "__main__":
    errors.end_with_launcher()
    errors.run(main, **ADVICE)
    if torch.distributed.is_initialized():  # after main's objects are gone, and all ranks together
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
