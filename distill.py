"""Lets a chat model answer prompts and writes the conversations to a file. Heads learn best from the backbone's own
words, because those are what they have to guess (Medusa paper, section 2.3).

    python distill.py --model_name_or_path models/SmolLM2-135M-Instruct --prompts data/quickstart_prompts.txt \
        --output data/quickstart.jsonl --max_new_tokens 512 --batch_size 50

--prompts is a text file with one prompt per line, or a file of conversations, each asked up to its first answer. Run
again with the same --output, it continues after the last whole batch there. An answer that does not end within
--max_new_tokens is marked `"unfinished": true`: heads train on its text, but learn no end of turn from it.

Beside the messages a record has the tokens that the model read and wrote (`prompt_ids`, `answer_ids`). train.py trains
on those: they are the context in which the model answered, thoughts included, whatever the chat template would make of
the messages. `distilled` says with what they were made; with anything else the output is not gone on with.
"""

import argparse
import io
import json
import logging
import os
import sys
from bisect import bisect_right
from collections import Counter
from datetime import date as Date
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import set_seed

from common import errors, terminal
from common.errors import BadInput
from common.files import check_can_write, write_atomically
from conversations.options import add_options, parse_kwargs
from conversations.prompts import read_prompts, tokenise, with_system
from conversations.template import ChatTemplate
from conversations.thoughts import OPEN_END
from conversations.tokenizer import load_tokenizer, to_words
from decoding.answers import answer_all
from medusa_model import MedusaConfig, MedusaModel
from model.backbone import context_length, end_tokens, load_backbone
from model.bits import add_bits_option
from model.judge import check_whole

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    """Raises BadInput for impossible numbers, before anything loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="the chat model: the backbone the heads will be trained for")
    add("--prompts", required=True, help="a .txt file, one prompt a line; or conversations, as train.py reads them")
    add("--output", required=True, type=Path, help="the .jsonl file to write or go on with")
    add("--system", help="a system turn for prompts that have none")
    add("--max_new_tokens", type=int, default=512, help="longer answers are cut and marked unfinished")
    add("--max_prompt_length", type=int, default=1024, help="prompts of more tokens, template included, are left out")
    add("--batch_size", type=int, default=32, help="prompts answered at once")
    add("--temperature", type=float, default=0.0, help="0 is greedy: the model's most likely words")
    add("--limit", type=int, help="answer only the first so many prompts")
    add("--seed", type=int, default=0, help="of the sampling, if --temperature is above 0")
    add_bits_option(parser)
    add_options(parser)
    args = parser.parse_args()
    counts = [args.batch_size, args.max_new_tokens, args.max_prompt_length]
    if min(counts + [args.limit] * (args.limit is not None)) < 1 or args.temperature < 0:
        raise BadInput(
            "--batch_size, --max_new_tokens, --max_prompt_length and --limit must be 1 or more, --temperature 0 or "
            "more"
        )
    return args


def settings(args, date: Date) -> dict:
    """What a record says of how it was made."""
    name = args.model_name_or_path
    made = {"model": os.path.abspath(name) if os.path.isdir(name) else name, "temperature": args.temperature}
    made |= {"max_new_tokens": args.max_new_tokens, "max_prompt_length": args.max_prompt_length}
    made["date"] = date.isoformat()
    if args.backbone_dtype:
        made["backbone_dtype"] = args.backbone_dtype
    return made | ({"seed": args.seed} if args.temperature else {})


def check_same(output: Path, records: list[dict], ids: dict[int, list[int]], made: dict):
    """Raises BadInput if the output's records answer other prompts (ids: tokens by number), or were made otherwise."""
    for record in records:
        number = record["prompt"]
        before = record.get("distilled")
        if not isinstance(before, dict):
            raise BadInput(f"{output} is of an earlier version, which does not say how: choose another --output")
        for key in sorted(before.keys() | made.keys()):
            if before.get(key) != made.get(key):
                raise BadInput(
                    f"{output} holds answers made with {key} {before.get(key)}, not {made.get(key)}: use the same, or "
                    "choose another --output"
                )
        if ids.get(number) != record["prompt_ids"]:
            raise BadInput(
                f"{output} holds answers to other prompts: its prompt {number} is not the one that is asked now. Give "
                "the same --prompts, --system and chat template, or choose another --output"
            )


def read_output(output: Path) -> tuple[str, list[dict]]:
    """What is there already: its text, and the records of its whole lines. Raises BadInput if this script did not
    write it."""
    start = '{"prompt": '
    try:
        text = output.read_text(encoding="utf-8") if output.exists() else ""
        if text[: len(start)] != start[: len(text)]:
            raise ValueError("not a record of this script")
        records = [json.loads(line) for line in text.split("\n")[:-1]]  # the last line is empty, or was cut off
        if not all(type(record["prompt"]) is int and isinstance(record["prompt_ids"], list) for record in records):
            raise ValueError("not a record of this script")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{output} exists and was not written by distill.py: choose another --output") from error
    return text, records


def first_day(records: list[dict]) -> Date:
    """What a template prints that asks for the date: the day on which the output was begun."""
    try:
        return Date.fromisoformat(records[0]["distilled"]["date"])
    except (LookupError, TypeError, ValueError):  # it is new, or `check_same` says what is wrong
        return Date.today()


def answered(output: Path, text: str, records: list[dict], asked: list[int], batch_size: int) -> int:
    """How many of the prompts `asked` (their numbers, in order) the output has answers for, in whole batches. Removes
    the answers of a batch that a kill cut off: answered again as a whole, sampled answers are those of an
    uninterrupted run."""
    prompts = [record["prompt"] for record in records]
    done = bisect_right(asked, max(prompts, default=0)) // batch_size * batch_size
    last = asked[done - 1] if done else 0
    lines = zip(text.split("\n"), prompts, strict=False)
    kept = "".join(line + "\n" for line, prompt in lines if prompt <= last)
    if kept != text:
        write_atomically(output, lambda path: path.write_text(kept, encoding="utf-8"))
    return done


def load(args) -> tuple[MedusaModel, set[int]]:
    """The model, without heads, and its end tokens. Raises BadInput if there are none, or if a prompt and its answer
    may not fit into the model's context."""
    backbone = load_backbone(args.model_name_or_path, bits=args.backbone_dtype, dtype=torch.bfloat16)
    ends = end_tokens(backbone)
    context = context_length(backbone)
    if args.max_prompt_length + args.max_new_tokens > context:
        raise BadInput(
            f"--max_prompt_length {args.max_prompt_length} and --max_new_tokens {args.max_new_tokens} do not fit "
            f"together into the {context} tokens that {args.model_name_or_path} can read: lower one of them"
        )
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=0))
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"  # Any: transformers annotates `to` without its self
    model.to(device)
    check_whole(model)
    return model, ends


def to_text(answer: list[int], ends: set[int], tokenizer) -> tuple[str, str]:
    """-> (the answer's text, "finished", "unfinished" or "empty")."""
    if answer[-1] in ends:
        text, kind = to_words(answer[:-1], tokenizer), "finished"
    else:  # its last token may be half a character
        text, kind = to_words(answer, tokenizer).rstrip("\ufffd"), "unfinished"
    return text.strip(), kind if text.strip() else "empty"


def to_record(
    number: int, conversation: dict, prompt_ids: list[int], answer: list[int], text: str, chat, made: dict
) -> dict:
    """A line of the output. The messages are for other programs and for people; a thought that the prompt has opened
    is whole there."""
    opened = OPEN_END.search(chat.tokenizer.decode(prompt_ids))
    turns = [*conversation["messages"], {"role": "assistant", "content": (opened[0] if opened else "") + text}]
    record = {"prompt": number, "messages": turns}
    if conversation.get("tools"):
        record["tools"] = conversation["tools"]
    return record | {"prompt_ids": prompt_ids, "answer_ids": answer, "distilled": made}


def main():
    terminal.start()
    args = parse_arguments()
    kwargs, output = parse_kwargs(args.chat_template_kwargs), args.output
    if output.is_dir():
        raise BadInput(f"--output {output} is a directory: name a .jsonl file")
    check_can_write(output.parent, "--output")
    prompts = read_prompts(args.prompts, config=args.dataset_config, split=args.train_split)[: args.limit]
    prompts = [with_system(conversation, args.system) for conversation in prompts]
    tokenizer = load_tokenizer(args.model_name_or_path, args.chat_template)
    text, records = read_output(output)
    date = first_day(records)
    chat = ChatTemplate(tokenizer, kwargs=kwargs, date=date)
    refused: Counter[str] = Counter()
    ids = dict(enumerate(tokenise(prompts, chat, refused), 1))
    if prompts and not any(ids.values()):
        raise BadInput(f"{args.prompts}: no prompt can be asked: {next(iter(refused), 'they have no tokens')}")
    asked = [number for number in ids if 0 < len(ids[number]) <= args.max_prompt_length]
    batch_size = min(args.batch_size, len(asked)) or 1
    made = settings(args, date)
    check_same(output, records, ids, made)
    done = answered(output, text, records, asked, batch_size)
    if done:
        logger.info("%s: going on after prompt %d of %d", output, asked[done - 1], len(prompts))
    model, ends = load(args)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Copies of the longest prompt fill up the last batch. So cache and batches have the same shape however much is
    # left, and bf16 sums and samples are those of an uninterrupted run. Batches of nothing but copies are not decoded.
    filling = [max((ids[number] for number in asked), key=len, default=[])] * batch_size
    left = [ids[number] for number in asked[done:]]
    answers = answer_all(model, left + filling, args.max_new_tokens, batch_size, ends, args.temperature)
    kinds: Counter[str] = Counter()
    with (
        open(output, "a", encoding="utf-8") as file,
        tqdm(total=len(asked), initial=done, unit="prompt", disable=None) as bar,
    ):
        for place, number in enumerate(asked[done:], done):
            if place % batch_size == 0:  # the next answer begins a batch
                file.flush()
                set_seed(args.seed + place)  # so that a resumed run draws the same samples
            answer = next(answers)
            words, kind = to_text(answer, ends, tokenizer)
            kinds[kind] += 1
            bar.update()
            if kind == "empty":
                continue
            record = to_record(number, prompts[number - 1], ids[number], answer, words, chat, made)
            if kind == "unfinished":
                record["unfinished"] = True
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    logger.info(
        "%s: %d answers with an end and %d unfinished after %d tokens; left out: %d answers without text, %d prompts "
        "of more than %d tokens, %d prompts that the chat template does not write%s",
        *(output, kinds["finished"], kinds["unfinished"], args.max_new_tokens, kinds["empty"]),
        *(len(prompts) - len(asked) - refused.total(), args.max_prompt_length, refused.total()),
        "".join(f" ({reason})" for reason, _ in refused.most_common(1)),
    )


if __name__ == "__main__":
    cast(io.TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)
    errors.run(main, if_interrupted=": the same command goes on after the last whole batch")
