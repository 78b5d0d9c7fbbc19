"""The datasets that train.py's flags ask for."""

import logging

from datasets import Dataset

from conversations.rows import prepare
from conversations.sources import load_conversations, split_conversations
from conversations.summary import Summary
from conversations.template import ChatTemplate

logger = logging.getLogger(__name__)


def load_data(model_args, data_args, training_args, chat: ChatTemplate) -> tuple[Dataset, Dataset | None]:
    """-> (rows to train on, rows to evaluate on or None), and a table of what became of the records in the log. The
    first process tokenises; the others read its cache."""
    source = {"cache_dir": training_args.cache_dir, "config": data_args.dataset_config}
    lengths = {"max_length": data_args.model_max_length, "min_length": model_args.num_heads + 2}
    packing = data_args.packing and not data_args.show_data  # a person reads one conversation at a time
    train, held_out = Summary(" ".join(data_args.data_path)), Summary("the held-out part")
    with training_args.main_process_first(desc="tokenising"):
        eval_data = None
        if data_args.eval_data_path or data_args.eval_split:
            paths, split = data_args.eval_data_path or data_args.data_path, data_args.eval_split or "train"
            held_out.name = " ".join(paths)
            eval_data = load_conversations(paths, held_out, split=split, **source)
        train_data = load_conversations(data_args.data_path, train, split=data_args.train_split, **source)
        before, separate = set(train_data["record"]), eval_data is not None
        train_data, eval_data = split_conversations(train_data, eval_data, data_args.eval_holdout)
        for record in before - set(train_data["record"]):
            train.skip("held out to evaluate on", record)
        if eval_data is not None and not separate:
            held_out.read = len(eval_data)
        train_data = prepare(train_data, train, chat, lazy=data_args.lazy_preprocess, packing=packing, **lengths)
        if eval_data is not None:
            eval_data = prepare(eval_data, held_out, chat, by_length=True, **lengths)
    logger.info("%s\n%s", train.table(), held_out.table() if eval_data is not None else "")
    logger.info("%d rows to train on, %d to evaluate on", len(train_data), len(eval_data or []))
    return train_data, eval_data
