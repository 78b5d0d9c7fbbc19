"""Trains Medusa heads on conversations: stage 1 (backbone frozen) or stage 2 (everything).

    python train.py --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct --data_path chats.jsonl \
        --output_dir out/heads --medusa_only_heads True --bf16 True

scripts/llama3_8b_medusa.sh has settings that suit an 8B model; training/arguments.py has every flag.
"""

import logging
import sys

import torch

from callback import EfficiencyCallback, FlopCount
from common import errors, terminal
from conversations import preview
from conversations.batches import Collator
from conversations.options import parse_kwargs
from conversations.template import ChatTemplate
from conversations.tokenizer import load_stops, load_tokenizer
from training import advice, run, vocabulary
from training.arguments import parse
from training.build import build_model, check_before_data, choose_head_type
from training.data import check_steps, check_writable, load_data
from training.stop import STATUS, StopCallback
from training.trainer import MedusaTrainer
from training.watchdog import Watchdog

logger = logging.getLogger(__name__)

ADVICE = {
    "if_interrupted": ": go on from the last checkpoint with --resume_from_checkpoint True",
    "if_out_of_memory": "Lower --per_device_train_batch_size (and raise --gradient_accumulation_steps by as much), "
    "--model_max_length or --medusa_num_heads; in stage 2 add --gradient_checkpointing True. --plan says what fits.",
}


def main():
    terminal.start()
    model_args, data_args, training_args = parse(sys.argv[1:])
    model_args.medusa_vocab_size = vocabulary.draft_size(model_args, training_args)
    choose_head_type(model_args)
    if training_args.plan:
        return advice.show(model_args, data_args, training_args)
    checkpoint = None if data_args.show_data else run.find_checkpoint(model_args, data_args, training_args)
    check_writable(training_args, shows=bool(data_args.show_data))
    date = run.first_day(checkpoint)
    access = {"cache_dir": training_args.cache_dir, "trust_remote_code": model_args.trust_remote_code}
    name = model_args.model_name_or_path
    tokenizer = load_tokenizer(name, model_args.chat_template, **access)
    length, stage_1 = data_args.model_max_length, training_args.medusa_only_heads
    adapts = training_args.lora_rank is not None
    check_before_data(
        name, tokenizer, length, trains_backbone=not stage_1, adapts=adapts, bits=training_args.bits, **access
    )
    chat = ChatTemplate(tokenizer, load_stops(name, **access), parse_kwargs(model_args.chat_template_kwargs), date)
    train_data, eval_data = load_data(model_args, data_args, training_args, chat)
    if data_args.show_data:
        return preview.show(train_data, chat, data_args.show_data if training_args.process_index == 0 else 0)
    check_steps(training_args, train_data)
    identity = run.identity(model_args, data_args, training_args, checkpoint, date, train_data, eval_data)
    tokens = vocabulary.choose_tokens(model_args, training_args, checkpoint, train_data, eval_data, chat.stops)
    model = build_model(model_args, data_args, training_args, checkpoint, tokens)
    trainer = MedusaTrainer(
        model=model,
        args=training_args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=Collator.of(tokenizer),
        processing_class=tokenizer,
        meter=EfficiencyCallback(FlopCount.of(model), training_args.device, world_size=training_args.world_size),
        run=identity,
    )
    run.begin(training_args, trainer.where)
    trainer.add_callback(stop := StopCallback())
    trainer.add_callback(Watchdog(training_args.ddp_timeout))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.stopped:
        print("stopped by SIGTERM" + ADVICE["if_interrupted"], file=sys.stderr)
        sys.exit(STATUS)
    trainer.save_model()
    if training_args.do_eval:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_state()
    logger.info("saved to %s", training_args.output_dir)


if __name__ == "__main__":
    errors.end_with_launcher()
    errors.run(main, **ADVICE)
    if torch.distributed.is_initialized():  # once main's objects are gone, on all ranks together
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
