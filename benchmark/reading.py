"""How fast are conversations read and tokenised, and how much memory does it take?

    python benchmark/reading.py --tokenizer models/SmolLM2-135M-Instruct --out reading.csv

Writes a file of JSON lines (or reads --data_path) and measures, each in a process of its own and alternately:

read      `load_conversations`, next to `datasets.load_dataset("json", ...)`: seconds, the peak of resident memory
tokenise  `prepare` in one process, next to the tokenizer alone on the same texts: thousands of tokens a second
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets

from common import errors, provenance
from conversations.answers import find_quickly
from conversations.rows import prepare
from conversations.sources import load_conversations
from conversations.summary import Summary
from conversations.template import ChatTemplate
from conversations.tokenizer import load_tokenizer

WORDS = "the moon rises over old stones because salt water runs cold café “new” bread, river. sings\n"


def write_conversations(path: Path, megabytes: float):
    """ShareGPT's shape: one to four rounds of 2,000 to 8,000 characters in all, half of them with \\u escapes."""
    rng, words = random.Random(0), WORDS.split(" ")
    sentences = [" ".join(rng.choices(words, k=rng.randint(6, 18))) for _ in range(5000)]

    def text(length: float) -> str:
        return " ".join(rng.choices(sentences, k=max(1, round(length / 65))))

    with path.open("w", encoding="utf-8") as file:
        number = 0
        while file.tell() < megabytes * 1e6:
            total, rounds = rng.randint(2000, 8000), rng.randint(1, 4)
            turns = [
                {"from": who, "value": text(total / rounds * share)}
                for _ in range(rounds)
                for who, share in (("human", 0.2), ("gpt", 0.8))
            ]
            number += 1
            line = json.dumps({"id": f"{number}", "conversations": turns}, ensure_ascii=number % 2 == 0)
            file.write(line + "\n")


def read(who: str, path: str, cache: str) -> dict:
    start = time.perf_counter()
    if who == "ours":
        data = load_conversations(path, Summary(path), cache_dir=cache)
    else:
        data = datasets.load_dataset("json", data_files=path, cache_dir=cache, split="train")
    return {"seconds": time.perf_counter() - start, "records": len(data)}


def tokenise(who: str, path: str, cache: str, tokenizer: str, count: int) -> dict:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.cpu_count = lambda: 1  # so that `prepare` starts no processes
    chat = ChatTemplate(load_tokenizer(tokenizer))
    data = load_conversations(path, Summary(path), cache_dir=cache)
    data = data.select(range(min(count, len(data))))
    if who == "ours":
        start = time.perf_counter()
        tokens = int(sum(prepare(data, Summary(path, len(data)), chat, 10**6)["length"]))
    else:
        found = [find_quickly({"messages": messages}, chat) for messages in data["messages"]]
        texts = [rows[0][0].text for rows in found if rows]
        start = time.perf_counter()
        tokens = sum(map(len, chat.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "records": len(data), "tokens": tokens, "per_s": tokens / 1000 / seconds}


def measure(what: str, who: str, options, path: str) -> dict:
    """One measurement, in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        argv = [sys.executable, __file__, "--child", what, who, path, cache]
        argv += ["--tokenizer", options.tokenizer, "--conversations", str(options.conversations), "--out", ""]
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb() -> float:
    """Of resident memory. (getrusage's figure is inherited from the process that started this one.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024 / 1e6  # type: ignore[index]  # Linux has it


def child(options):
    what, who, path, cache = options.child
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    before = peak_mb()
    if what == "read":
        found = read(who, path, cache)
    else:
        found = tokenise(who, path, cache, options.tokenizer, options.conversations)
    print(json.dumps(found | {"peak_mb": peak_mb(), "imports_mb": before}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokenizer", required=True, help="a directory or a Hub id")
    add("--data_path", help="measure with this file instead")
    add("--megabytes", type=float, default=500, help="of the file that is written")
    add("--conversations", type=int, default=2000, help="so many are tokenised")
    add("--rounds", type=int, default=3, help="of all measurements")
    add("--out", required=True, help="CSV to append to")
    add("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    from setting import append  # not at the top: it imports torch, and the memory of children is measured

    with tempfile.TemporaryDirectory() as directory:
        path = options.data_path or f"{directory}/chats.jsonl"
        if not options.data_path:
            write_conversations(Path(path), options.megabytes)
        for number in range(options.rounds):
            for what, who in (("read", "ours"), ("read", "datasets"), ("tokenise", "ours"), ("tokenise", "tokenizer")):
                found = measure(what, who, options, path)
                row = {"date": date.today().isoformat(), "commit": provenance.commit(), "round": number + 1}
                row |= {"what": what, "who": who, "file_mb": f"{os.path.getsize(path) / 1e6:.1f}"}
                row |= {
                    "seconds": f"{found['seconds']:.3f}",
                    "records": found["records"],
                    "tokens": found.get("tokens", ""),
                }
                row["per_s"] = f"{found['per_s']:.0f}" if "per_s" in found else ""
                row |= {key: f"{found[key]:.0f}" for key in ("peak_mb", "imports_mb")}
                row |= {"versions": provenance.versions(), "command": provenance.command()}
                append(Path(options.out), row)
                print(what, who, *(f"{key} {row[key]}" for key in ("seconds", "peak_mb", "per_s")), flush=True)


if __name__ == "__main__":
    errors.run(main)
