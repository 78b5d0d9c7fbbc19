"""Asks a chat model to answer prompts and writes the conversations down: heads learn best from the backbone's own
words, because those are what they will have to guess (Medusa paper, section 2.3).

    python distill.py --model_name_or_path models/SmolLM2-135M-Instruct --prompts data/quickstart_prompts.txt \
        --output data/quickstart.jsonl --max_new_tokens 512 --batch_size 50

Prompts: a text file with one a line, or a file train.py reads (then each conversation's first question is asked).
Started again with the same --output, it goes on after the last whole batch there. An answer that does not end within
--max_new_tokens is left out: its cut would teach an end of turn where the model has none.
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed

import errors
from backbone import load_backbone
from chat_data import load_conversations, load_tokenizer
from errors import BadInput
from medusa_checkpoint import write_atomically

logger = logging.getLogger(__name__)


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "The chat model: the backbone the heads will be trained for."})
    prompts: str = field(metadata={"help": "A .txt file, one prompt a line; or .json/.jsonl conversations."})
    output: str = field(metadata={"help": "The .jsonl file to write or go on with."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer in tokens."})
    batch_size: int = field(default=32, metadata={"help": "Prompts answered at once."})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy: the model's most likely words."})
    limit: int | None = field(default=None, metadata={"help": "Answer only the first so many prompts."})
    seed: int = field(default=0, metadata={"help": "Of the sampling, if --temperature is above 0."})


def read_prompts(path: str) -> list[str]:
    """Raises BadInput if there are none."""
    if path.endswith((".json", ".jsonl")):
        conversations = load_conversations(path)["messages"]
        return [next(m["content"] for m in messages if m["role"] == "user") for messages in conversations]
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the prompts in {path}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{path} holds no prompts: write one a line")
    return prompts


def answered(output: Path, batch_size: int) -> int:
    """How many prompts the output is past already, in whole batches: a batch that a kill cut off is answered anew,
    so that a sampled answer is the same as without the kill. Raises BadInput if it is no output of this script."""
    text = output.read_text(encoding="utf-8") if output.exists() else ""
    lines = text.split("\n")[:-1]  # behind the last line end there is nothing, or a line that was cut off
    start = '{"prompt": '
    try:
        if text[: len(start)] != start[: len(text)]:
            raise ValueError("not a record of this script")
        prompts = [json.loads(line)["prompt"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{output} exists and was not written by distill.py: choose another --output") from error
    done = max(prompts, default=0) // batch_size * batch_size
    kept = "".join(line + "\n" for line, prompt in zip(lines, prompts, strict=True) if prompt <= done)
    if kept != text:
        write_atomically(output, lambda path: path.write_text(kept, encoding="utf-8"))
    return done


@torch.inference_mode()
def answer(model, tokenizer, prompts: list[str], args) -> list[str | None]:
    """One answer per prompt, None where it did not end within max_new_tokens."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    sampling = {"do_sample": False}
    if args.temperature:  # from the whole distribution: Medusa's typical acceptance cuts the tail itself
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, **sampling)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = []
    for ids in out[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        text = "" if end is None else tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
        answers.append(text or None)
    return answers


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    except ValueError as error:  # an unknown flag
        raise BadInput(str(error)) from error
    if args.batch_size < 1 or args.max_new_tokens < 1 or args.temperature < 0:
        raise BadInput("--batch_size and --max_new_tokens must be 1 or more, --temperature 0 or more")
    prompts = read_prompts(args.prompts)[: args.limit]
    output = Path(args.output)
    done = answered(output, args.batch_size)
    if done:
        logger.info("%s: going on after prompt %d of %d", output, done, len(prompts))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(args.model_name_or_path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = load_backbone(args.model_name_or_path, dtype=torch.bfloat16).to(device).eval()
    if model.generation_config.eos_token_id is None:
        raise BadInput(f"{args.model_name_or_path} names no end-of-sequence token: no answer would ever end")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = 0
    with open(output, "a", encoding="utf-8") as file, tqdm(total=len(prompts), initial=done, unit="prompt") as bar:
        for start in range(done, len(prompts), args.batch_size):
            set_seed(args.seed + start)  # so that a resumed run samples what it would have sampled
            batch = prompts[start : start + args.batch_size]
            for i, (prompt, text) in enumerate(zip(batch, answer(model, tokenizer, batch, args), strict=True)):
                if text is None:
                    unfinished += 1
                    continue
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
                record = {"prompt": start + i + 1, "messages": messages}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))
    logger.info(
        "%s: left out %d answers, empty or without an end in %d tokens", output, unfinished, args.max_new_tokens
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    errors.run(main)
