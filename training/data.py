"""The datasets that train.py's flags ask for."""

import logging

from datasets import Dataset

from conversations.rows import prepare
from conversations.sources import load_conversations, split_conversations

logger = logging.getLogger(__name__)


def load_data(model_args, data_args, training_args, tokenizer) -> tuple[Dataset, Dataset | None]:
    """-> (rows to train on, rows to evaluate on or None). The first process tokenises; the others read its cache."""
    with training_args.main_process_first(desc="tokenising"):
        cache_dir = training_args.cache_dir
        eval_data = load_conversations(data_args.eval_data_path, cache_dir) if data_args.eval_data_path else None
        train_data = load_conversations(data_args.data_path, cache_dir)
        train_data, eval_data = split_conversations(train_data, eval_data, data_args.eval_holdout)
        lengths = {"max_length": data_args.model_max_length, "min_length": model_args.num_heads + 2}
        ways = {"lazy": data_args.lazy_preprocess, "packing": data_args.packing}
        train_data = prepare(train_data, data_args.data_path, tokenizer, **ways, **lengths)
        if eval_data is not None:
            name = data_args.eval_data_path or "the held-out part"
            eval_data = prepare(eval_data, name, tokenizer, by_length=True, **lengths)
    logger.info("%d rows to train on, %d to evaluate on", len(train_data), len(eval_data or []))
    return train_data, eval_data
