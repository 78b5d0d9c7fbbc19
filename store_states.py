"""Runs the frozen backbone once over the conversations and stores its last hidden states, from which train.py trains
heads without running it again (stage 1).

    python store_states.py --model_name_or_path models/SmolLM2-135M-Instruct --data_path chats.jsonl \
        --eval_holdout 500 --output states
    python train.py --model_name_or_path models/SmolLM2-135M-Instruct --states_path states --medusa_only_heads True ...

The conversations are chosen with train.py's flags. A token takes hidden_size x 2 bytes (8 KB for an 8B model) and 8
more. Run again with the same flags, it goes on after the last whole file. Launched with several processes
(`accelerate launch`), they take files in turn. training/states.py says what is in the files.
"""

import contextlib
import itertools
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from datetime import date as Date
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from common import errors, provenance, terminal
from common.errors import BadInput, first_line
from common.files import check_can_write, write_atomically
from conversations.batches import Collator
from conversations.options import parse_kwargs
from conversations.template import ChatTemplate
from conversations.tokenizer import load_stops, load_tokenizer
from medusa_model import MedusaConfig, MedusaModel
from model.backbone import load_backbone, load_backbone_config, load_without_layers
from model.bits import BITS
from model.judge import check_whole
from training.arguments import ConversationArguments, DataArguments, ModelArguments, TrainingArguments, read_flags
from training.build import check_before_data
from training.data import load_data
from training.refusals import about_conversations, refuse_first
from training.run import check_same
from training.states import INDEX, PARTS, PLAN, checksum, open_shard, read_plan, write_json
from training.store_plan import all_shards, begun, check_disk, check_plan, make_plan, missing

logger = logging.getLogger(__name__)

LIKE = {flag.name: flag.metadata for flag in (*fields(ModelArguments), *fields(TrainingArguments))}  # train.py's help
ADVICE = {
    "if_interrupted": ": the same command goes on after the last whole file",
    "if_out_of_memory": "Lower --batch_size.",
}


@dataclass
class StoreArguments:
    model_name_or_path: str = field(metadata=LIKE["model_name_or_path"])
    output: str = field(metadata={"help": "The directory to write, or to go on with."})
    batch_size: int = field(default=8, metadata={"help": "Rows that each process computes at once."})
    dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "Of the backbone and of the states: bfloat16 for training with --bf16 True.",
            "choices": ["bfloat16", "float32"],
        },
    )
    backbone_dtype: str | None = field(default=None, metadata=LIKE["backbone_dtype"] | {"choices": [*BITS]})
    medusa_num_heads: int = field(
        default=5,
        metadata={"help": "The most heads to train from the states: rows too short for the last are left out."},
    )
    chat_template: str | None = field(default=None, metadata=LIKE["chat_template"])
    chat_template_kwargs: str | None = field(default=None, metadata=LIKE["chat_template_kwargs"])
    trust_remote_code: bool = field(default=False, metadata=LIKE["trust_remote_code"])
    cache_dir: str | None = field(default=None, metadata=LIKE["cache_dir"])

    @property
    def num_heads(self) -> int:
        return self.medusa_num_heads

    @contextlib.contextmanager
    def main_process_first(self, desc: str):
        """As accelerate's, whose other processes would wait for ever if the first one fails."""
        state = PartialState()
        if not state.is_main_process:
            state.wait_for_everyone()
        try:
            yield
        finally:
            if state.is_main_process:
                state.wait_for_everyone()


@contextlib.contextmanager
def together():
    """All processes end this block together. If one fails in it, the others raise BadInput: they would wait for it."""
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    sentence = failed and str(failed)
    if failed and not isinstance(failed, BadInput):
        sentence = f"process {PartialState().process_index} ended with {type(failed).__name__}: {first_line(failed)}"
    sentences = gather_object([sentence])
    if failed is not None:
        raise failed
    if found := next(filter(None, sentences), None):
        raise BadInput(found)


def parse(argv: list[str]) -> tuple[StoreArguments, DataArguments]:
    """Raises BadInput before anything loads."""
    store, conversations = read_flags(argv, StoreArguments, ConversationArguments)
    data, heads = DataArguments(**vars(conversations)), store.medusa_num_heads
    refuse_first(
        (
            (store.batch_size < 1 or heads < 1, "--batch_size and --medusa_num_heads must be 1 or more"),
            (data.model_max_length < heads + 2, f"--model_max_length {data.model_max_length}: at least {heads + 2}"),
            *about_conversations(data),
        )
    )
    parse_kwargs(store.chat_template_kwargs)
    TrainingArguments.check_gpus()
    return store, data


def load(store, where: dict, device: torch.device) -> MedusaModel:
    """The whole backbone, as train.py has it in stage 1."""
    dtype = getattr(torch, store.dtype)
    backbone = load_backbone(store.model_name_or_path, bits=store.backbone_dtype, dtype=dtype, **where)
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=0))
    model.freeze_backbone()
    if device.type == "cuda":
        model.use_liger_in_backbone()
    model.to(device)  # type: ignore[arg-type]  # transformers annotates `to` without its self
    check_whole(model)
    return model


def compute(model: MedusaModel, rows: list[dict], collate: Collator, batch_size: int, bar: tqdm) -> dict:
    """The tensors of a shard. Rows of similar length are computed together, the longest first: if memory runs out, it
    does at once."""
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    lengths = [len(row["input_ids"]) for row in rows]
    starts = [0, *itertools.accumulate(lengths)]
    hidden = torch.empty(starts[-1], model.lm_head.weight.shape[1], dtype=dtype)
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    for at in range(0, len(order), batch_size):
        members = order[at : at + batch_size]
        ids = collate([rows[i] for i in members])["input_ids"].to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            states = model.last_hidden_state(ids).cpu()  # autocast, as in training: the same sums
        for i, found in zip(members, states, strict=True):
            hidden[starts[i] : starts[i + 1]] = found[: lengths[i]]
        bar.update(sum(lengths[i] for i in members))
    columns = {key: torch.cat([torch.tensor(row[key]) for row in rows]) for key in ("input_ids", "labels")}
    columns["lengths"] = torch.tensor(lengths)
    return {"hidden": hidden} | {key: column.to(torch.int32) for key, column in columns.items()}


@contextlib.contextmanager
def writing(path: Path):
    """An error of the disk is a BadInput, and nothing half-written stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            path.with_name(path.name + ".tmp").unlink(missing_ok=True)
        raise BadInput(
            f"could not write {path}: {first_line(error)}. Files before it are whole: the same command goes on"
        ) from error


def write(path: Path, tensors: dict):
    """Raises BadInput, and writes nothing, if a state is NaN or infinite, or if the disk refuses."""
    low, high = tensors["hidden"].aminmax(dim=1)  # NaN if there is one; no copy of a gigabyte
    if len(bad := (~(low.isfinite() & high.isfinite())).nonzero()):
        row = int(torch.searchsorted(tensors["lengths"].cumsum(0), bad[0], right=True))
        raise BadInput(
            f"the hidden states of {len(bad)} tokens of {path.parent.name}/{path.name} are NaN or infinite, the first "
            f"in row {row} of that file, which was not written: the model computes them in "
            f"{str(tensors['hidden'].dtype)[6:]}; try another --dtype, or look at the model"
        )
    with writing(path):
        write_atomically(path, partial(save_file, tensors, metadata={"format": "pt"}))


def store_all(model: MedusaModel | None, output: Path, mine: list[tuple], most: int, collate: Collator, batch_size):
    """Writes shards: pairs of a shard and its rows. One is written while the next is computed. Processes meet after
    each of `most` shards, the most that one of them has: if one fails, none goes on for hours."""
    silent = None if PartialState().is_main_process else True  # None: on a terminal only
    total, written = sum(shard["tokens"] for shard, _ in mine), Future[None]()
    written.set_result(None)
    with ThreadPoolExecutor(1) as pool, tqdm(total=total, unit="token", unit_scale=True, disable=silent) as bar:
        for number in range(most):
            with together():
                if model is not None and number < len(mine):
                    shard, rows = mine[number]
                    tensors = compute(model, list(rows), collate, batch_size, bar)
                    written.result()
                    written = pool.submit(write, output / shard["file"], tensors)
                    logger.info("%s: %d of %d files", shard["file"], number + 1, len(mine))
        with together():
            written.result()


def with_rows(plan: dict, rows: dict) -> Iterator[tuple]:
    """The shards, each with its rows, which are read when they are asked for."""
    for part, shards in plan["shards"].items():
        ends = itertools.accumulate((shard["rows"] for shard in shards), initial=0)
        for shard, start in zip(shards, ends, strict=False):
            yield shard, map(rows[part].__getitem__, range(start, start + shard["rows"]))


def begin(output: Path, plan: dict, left: list[str]):
    """Writes the plan, first of all: without it, a later run would not know the directory. Then deletes what is
    damaged, and at last the index, which tells it: so it is made anew even if this run is killed too."""
    with writing(output / PLAN):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / PLAN, plan)
        for file in left:
            (output / file).parent.mkdir(exist_ok=True)
            (output / file).unlink(missing_ok=True)
        (output / INDEX).unlink(missing_ok=True)


def finish(output: Path, plan: dict):
    """Writes the index, with the checksum of every shard."""
    for shard in all_shards(plan):
        shard["checksum"] = checksum(open_shard(output / shard["file"], shard, plan))
    with writing(output / INDEX):
        write_json(output / INDEX, plan | {"versions": provenance.versions()})


def main():
    terminal.start()
    store, data_args = parse(sys.argv[1:])
    # Rank 0 tokenises before the others: that may take hours, and they wait.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    output, name = Path(store.output), store.model_name_or_path
    where = {"cache_dir": store.cache_dir, "trust_remote_code": store.trust_remote_code}
    with together():
        check_can_write(output, "--output")
        before = begun(output)
        config = load_backbone_config(name, **where)
        tokenizer, stops = load_tokenizer(name, store.chat_template, **where), load_stops(name, **where)
        check_before_data(name, tokenizer, data_args.model_max_length, bits=store.backbone_dtype, **where)
    # For templates that print it: rank 0's, as midnight may fall between two.
    date = gather_object([Date.fromisoformat(before["date"]) if before else Date.today()])[0]
    with together():
        chat = ChatTemplate(tokenizer, stops, parse_kwargs(store.chat_template_kwargs), date)
    with together():
        parts = zip(PARTS, load_data(store, data_args, store, chat), strict=True)
        rows = {part: found for part, found in parts if found is not None}
        backbone = load_without_layers(name, config, dtype=getattr(torch, store.dtype), **where)
        plan = make_plan(store, data_args, chat, date, backbone, rows)
        del backbone
        if before:
            check_plan(output, before, plan)
        index = read_plan(output / INDEX) if (output / INDEX).is_file() else None
        left = missing(output, index or plan)
        if whole := index is not None and not left:
            logger.info("%s is whole: there is nothing left to store", output)
        else:
            check_disk(output, plan, left)
    check_same(**{"data set" if key == "data" else key: plan[key] for key in plan if key != "model_name_or_path"})
    whole, left = gather_object([(whole, left)])[0]
    if whole:
        return
    with together():
        if state.is_main_process:
            begin(output, plan, left)
    with together():
        if not (output / PLAN).is_file():
            raise BadInput(f"rank {state.process_index} does not see {output / PLAN} of rank 0: all need one --output")
        todo = [(shard, of) for shard, of in with_rows(plan, rows) if shard["file"] in left]
        mine = todo[state.process_index :: state.num_processes]
        model = load(store, where, state.device) if mine else None
    most = -(-len(todo) // state.num_processes)
    store_all(model, output, mine, most, Collator.of(tokenizer), store.batch_size)
    with together():
        if state.is_main_process:
            finish(output, plan)
            logger.info("%s is whole: train with --states_path %s", output, output)


if __name__ == "__main__":
    errors.end_with_launcher()
    errors.run(main, **ADVICE)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
