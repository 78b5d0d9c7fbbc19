"""--medusa_vocab_size: which tokens the heads guess (model/vocabulary.py), by counting the training data's labels."""

import logging
import os
from collections.abc import Iterator, Set
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from common.errors import BadInput
from conversations.tokenizer import load_stops
from model.backbone import load_backbone_config
from model.heads_file import find_heads, load_token_map
from training.checkpoints import STATE_DIR
from training.state import saved_token_map
from training.states import StoredRows

logger = logging.getLogger(__name__)


def vocab_size(model_args, training_args) -> int:
    """V, of the backbone."""
    where = {"cache_dir": training_args.cache_dir, "trust_remote_code": model_args.trust_remote_code}
    return load_backbone_config(model_args.model_name_or_path, **where).get_text_config().vocab_size


def draft_size(model_args, training_args) -> int | None:
    """V' of this run: of the heads that it starts from, or what --medusa_vocab_size says. None: the heads guess all
    tokens. Raises BadInput if the two differ, or for a size that cannot be."""
    asked, name, heads = model_args.medusa_vocab_size, model_args.model_name_or_path, model_args.medusa_heads_path
    full = None if asked is None else vocab_size(model_args, training_args)
    if heads is not None and os.path.isdir(heads):  # a run that is resumed does without them
        token_map = load_token_map(find_heads(heads)[0])
        found = full if token_map is None else len(token_map)
        if asked not in (None, found):
            raise BadInput(f"--medusa_vocab_size {asked}: the heads in {heads} guess {found} tokens; leave it out")
        return None if token_map is None else found
    if full is None or asked == full:
        return None
    if asked > full:
        raise BadInput(f"--medusa_vocab_size {asked}: {name} has only {full} tokens")
    stops = load_stops(name, cache_dir=training_args.cache_dir, trust_remote_code=model_args.trust_remote_code)
    if asked < len(stops):
        raise BadInput(f"--medusa_vocab_size {asked}: {name} stops on {len(stops)} tokens, and heads must guess those")
    return asked


def choose_tokens(
    model_args, training_args, checkpoint: Path | None, train_data, eval_data, stops: Set[int]
) -> torch.Tensor | None:
    """-> token_map, int64 `[V']`, or None for all tokens; the same on every process. It is that of the checkpoint, or
    of the heads that the run starts from, or follows from the labels. Where a run begins, the log has the share of
    labels that its heads can guess."""
    size, heads = model_args.medusa_vocab_size, model_args.medusa_heads_path
    if size is None:
        return None
    if checkpoint is not None:
        stage_1 = training_args.medusa_only_heads
        return load_token_map(checkpoint) if stage_1 else saved_token_map(checkpoint / STATE_DIR, size)
    full, sets = vocab_size(model_args, training_args), {"training": train_data, "evaluation": eval_data}
    counts = {name: count_labels(data, full) for name, data in sets.items() if has_labels(data)}
    token_map = None if heads is None else load_token_map(find_heads(heads)[0])
    if token_map is None:
        token_map = torch.from_numpy(most_frequent(counts["training"], size, stops))
    for name, found in counts.items():
        share = 100 * found[token_map.numpy()].sum() / found.sum()
        logger.info("the heads guess %d of %d tokens: %.2f %% of the %s labels", size, full, share, name)
    return token_map


def has_labels(data) -> bool:
    """Whether labels are there to count: not without data, and not where they are made when a batch is drawn."""
    return data is not None and "labels" in data.column_names


def count_labels(data, tokens: int) -> np.ndarray:
    """int64 `[tokens]`: how often each is a label."""
    counts = np.zeros(tokens, dtype=np.int64)
    for labels in data.whole_columns("labels") if isinstance(data, StoredRows) else arrow_columns(data, "labels"):
        counts += np.bincount(labels[labels >= 0], minlength=tokens)[:tokens]  # `check_sizes` refuses others
    return counts


def arrow_columns(data, *names: str) -> Iterator[np.ndarray]:
    """These columns of 10,000 rows, then of the next. Lists stand one behind the other."""
    for table in data.select_columns([*names]).with_format("arrow").iter(batch_size=10_000):
        for column in table.select(names).itercolumns():
            whole = column.combine_chunks()  # rows that were chosen one by one are a chunk each
            yield (whole.flatten() if isinstance(whole, pa.ListArray) else whole).to_numpy()


def most_frequent(counts: np.ndarray, size: int, always: Set[int]) -> np.ndarray:
    """The ids of `size` tokens, ascending: those of `always`, then by count; of equal counts the lowest id."""
    counts = counts.copy()
    counts[[token for token in always if 0 <= token < len(counts)]] = counts.max() + 1
    return np.sort(np.argsort(-counts, kind="stable")[:size])
