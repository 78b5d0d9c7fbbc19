"""The datasets that train.py's flags ask for."""

import logging

import torch
from datasets import Dataset

from common.errors import BadInput
from common.files import check_can_write
from conversations.rows import prepare
from conversations.sources import is_local, load_conversations, split_conversations
from conversations.summary import Summary
from conversations.template import ChatTemplate
from training.states import load_states

logger = logging.getLogger(__name__)


def check_writable(training_args, shows=False):
    """Raises BadInput, before hours of tokenising, if the run cannot write where it has to. shows: rows, no run."""
    if training_args.process_index == 0:
        if training_args.cache_dir is not None:
            check_can_write(training_args.cache_dir, "--cache_dir")
        if not shows:
            check_can_write(training_args.output_dir, "--output_dir")


def check_steps(training_args, train_data: Dataset):
    """Raises BadInput if there is not a row for each process, or not one whole batch where only whole ones count."""
    rows, processes = len(train_data), training_args.world_size
    if rows < processes:
        raise BadInput(f"{rows} rows to train on for {processes} processes: give more data, or start fewer processes")
    batch = training_args.train_batch_size * processes
    if training_args.dataloader_drop_last and rows < batch:
        raise BadInput(
            f"--dataloader_drop_last True leaves no step: {rows} rows to train on are fewer than the {batch} that "
            f"{processes} x --per_device_train_batch_size {training_args.train_batch_size} take"
        )


def load_data(model_args, data_args, training_args, chat: ChatTemplate) -> tuple[Dataset, Dataset | None]:
    """-> (rows to train on, rows to evaluate on or None), and a table of what became of the records in the log. The
    first process tokenises; the others read its cache. With --states_path: the rows that are stored there."""
    if data_args.states_path is not None:
        return load_states(model_args, data_args, chat, torch.bfloat16 if training_args.bf16 else torch.float32)
    lengths = {"max_length": data_args.model_max_length, "min_length": model_args.num_heads + 2}
    # A person who looks at rows (--show_data) reads one conversation at a time, and all of its rows.
    ways = {"lazy": data_args.lazy_preprocess, "packing": data_args.packing} if not data_args.show_data else {}
    eval_paths = data_args.eval_data_path or data_args.data_path
    train, held_out = Summary(" ".join(data_args.data_path)), Summary("the held-out part")

    def load(paths: list[str], split: str | None, summary: Summary) -> Dataset:
        # --dataset_config is for the Hub's part where the other is local.
        mixed = all(map(is_local, paths)) and not all(map(is_local, [*data_args.data_path, *eval_paths]))
        config = None if mixed else data_args.dataset_config
        return load_conversations(paths, summary, cache_dir=training_args.cache_dir, config=config, split=split)

    with training_args.main_process_first(desc="tokenising"):
        eval_data = None
        if separate := data_args.eval_data_path is not None or data_args.eval_split is not None:
            held_out.name = " ".join(eval_paths)
            eval_data = load(eval_paths, data_args.eval_split, held_out)
        train_data = load(data_args.data_path, data_args.train_split, train)
        before = set(train_data["record"])
        train_data, eval_data = split_conversations(train_data, eval_data, data_args.eval_holdout)
        for record in before - set(train_data["record"]):
            train.skip("held out to evaluate on", record)
        if eval_data is not None and not separate:
            held_out.read = len(eval_data)
        train_data = prepare(train_data, train, chat, **ways, **lengths)
        if eval_data is not None:
            eval_data = prepare(eval_data, held_out, chat, by_length=True, **lengths)
    for summary in [train] + [held_out] * (eval_data is not None):
        logger.info("\n%s\n", summary.table())
    logger.info("%d rows to train on, %d to evaluate on", len(train_data), len(eval_data or []))
    return train_data, eval_data
