"""Trains Medusa heads on conversations: stage 1 (backbone frozen) or stage 2 (everything).

    python train.py --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct --data_path chats.jsonl \
        --output_dir out/heads --medusa_only_heads True --bf16 True --learning_rate 1e-3

scripts/llama3_8b_medusa.sh is the same with settings that suit an 8B model; arguments.py has every flag.
"""

import json
import logging
import os
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import accelerate
import torch
import transformers
from transformers.integrations.liger import apply_liger_kernel

import errors
from arguments import parse
from batches import Collator
from callback import EfficiencyCallback, FlopCount
from chat_data import load_conversations, load_tokenizer, prepare, split_conversations
from errors import BadInput
from medusa_checkpoint import HEADS_DIR, HEADS_FILE, find_heads, load_config
from medusa_loss import choose_impl
from medusa_model import MedusaConfig, MedusaModel, load_backbone
from medusa_trainer import MedusaTrainer

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


def build_model(model_args, data_args, training_args, tokenizer) -> MedusaModel:
    trainable = getattr(torch, model_args.dtype)
    frozen = torch.bfloat16 if training_args.bf16 else torch.float32
    backbone = load_backbone(
        model_args.model_name_or_path,
        dtype=frozen if training_args.medusa_only_heads else trainable,
        cache_dir=training_args.cache_dir,
        trust_remote_code=model_args.trust_remote_code,
    )
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
    )
    if training_args.medusa_only_heads:
        model.freeze_backbone()
    model.loss_impl = choose_impl(model_args.use_liger, training_args.device)
    if model_args.use_liger and training_args.device.type == "cuda":
        # RMSNorm, RoPE and SwiGLU only. Liger's default would also replace the backbone's forward with its own loss.
        apply_liger_kernel(backbone, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    return model


def is_complete(checkpoint: Path) -> bool:
    """The Trainer writes trainer_state.json last: a checkpoint that lacks it was cut off by a kill."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def find_checkpoint(model_args, training_args) -> str | None:
    """The checkpoint to resume from, or None. Refuses to write over what another run left behind."""
    output_dir, resume = Path(training_args.output_dir), training_args.resume_from_checkpoint
    checkpoints = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    checkpoints.sort(key=lambda path: int(path.name.split("-")[1]))
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
        for path in reversed(checkpoints):
            if is_complete(path):
                checkpoint = path
                break
            logger.warning("%s is not complete and is ignored", path)
        else:
            raise BadInput(f"--resume_from_checkpoint True: there is no complete checkpoint in {output_dir}")
    else:
        checkpoint = Path(resume)
        if not is_complete(checkpoint):
            raise BadInput(f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint")
        if checkpoint.resolve().parent != output_dir.resolve():
            raise BadInput(f"{checkpoint} is another run's: resume with --output_dir {checkpoint.parent}")
    if model_args.medusa_return:
        base = model_args.model_name_or_path
        heads_dir, stage2 = find_heads(checkpoint)
        found = load_config(heads_dir) | {"medusa_only_heads": stage2 is None}
        asked = {
            "medusa_num_heads": model_args.medusa_num_heads,
            "medusa_num_layers": model_args.medusa_num_layers,
            "medusa_only_heads": training_args.medusa_only_heads,
        }
        if stage2 is None:  # a stage 2 checkpoint brings its backbone along
            found["model_name_or_path"] = found["base_model_name_or_path"]
            asked["model_name_or_path"] = os.path.abspath(base) if os.path.isdir(base) else base
        for key, value in asked.items():
            if found[key] != value:
                raise BadInput(
                    f"{checkpoint} was trained with --{key} {found[key]}, not {value}: use the same, or another "
                    "--output_dir"
                )
    logger.info("resuming from %s", checkpoint)
    return str(checkpoint)


def write_command(training_args):
    """train_command.txt: what made the weights beside it."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    commit = found.stdout.strip() if found.returncode == 0 else "not a git checkout"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    libraries = (torch, transformers, accelerate)
    versions = ", ".join(f"{library.__name__} {library.__version__}" for library in libraries)
    lines = (
        shlex.join([os.path.basename(sys.executable), *sys.argv]),
        f"date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"commit: {commit}",
        f"versions: python {sys.version.split()[0]}, {versions}",
        f"GPU: {gpu} (processes: {training_args.world_size})",
    )
    os.makedirs(training_args.output_dir, exist_ok=True)
    Path(training_args.output_dir, "train_command.txt").write_text("\n".join(lines) + "\n")


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
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
    model = build_model(model_args, data_args, training_args, tokenizer)

    trainer = MedusaTrainer(
        model=model,
        args=training_args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=Collator(pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0),
        processing_class=tokenizer,
        meter=EfficiencyCallback(FlopCount.of(model), training_args.device, world_size=training_args.world_size),
    )
    if trainer.is_world_process_zero():
        write_command(training_args)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if eval_data is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_state()
    logger.info("saved to %s", training_args.output_dir)


if __name__ == "__main__":
    errors.run(main)
    if torch.distributed.is_initialized():  # after main's objects are gone, and all ranks together
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
