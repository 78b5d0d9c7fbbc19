"""Makes prompts of the kinds that Spec-Bench asks, out of ShareGPT's conversations: to distill answers for heads that
shall speed up more than one kind of work.

    python benchmark/tasks.py sharegpt.json --german sentences.txt --train train.jsonl --eval held_out.jsonl
    python distill.py --model_name_or_path MODEL --prompts train.jsonl --output own.jsonl --max_prompt_length 2048

Writes questions as they were asked, and tasks made from what was said: summaries of a passage, passages with a
question at their end, short questions about names, sums in words. Sentences to translate come from --german: ShareGPT
has hardly any. The wordings are ours; none of Spec-Bench's texts are used. --eval gets prompts of the same kinds, from
the last --held_out conversations (and a twentieth of the sentences) alone. A conversation that is cut off at the end
of the file is left out, and so are prompts that are there twice.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from conversations.files import read_records
from conversations.records import CUT_OFF

KINDS = ("question", "translation", "qa", "sum", "summary", "passage")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-ZÄÖÜ])")
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}(?: (?:of |the )?[A-Z][a-z]+){0,2}")
TRANSLATE = ("Translate German to English: {}", "Translate to English: {}", "{}\n\nWhat is that in English?")
SUMMARISE = (
    "Summarize: {}",
    "Summarize this text: {}",
    "{}\n\nSummarize the text above.",
    "Give a short summary of this: {}",
)
ASK = (
    "What is {}?",
    "What does the text say about {}?",
    "Why is {} mentioned?",
    "Who or what is {}?",
    "When did {} begin?",
)
SHORT = (
    "what is {}?", "who is {}?", "when was {} made?", "where is {}?", "what is {} known for?", "who came up with {}?",
    "how many people know {}?", "what does {} mean?", "when did {} start?", "where does the name {} come from?",
)  # fmt: skip
PEOPLE = ("Maria", "Tom", "Ahmed", "Mei", "Olga", "Paul", "Ines", "Kofi", "Lena", "Ravi", "Clara", "Jonas")
THINGS = (
    "apple",
    "book",
    "ticket",
    "pencil",
    "cookie",
    "plant",
    "marble",
    "shirt",
    "stamp",
    "bottle",
    "card",
    "chair",
)
SUMS = (
    "{a} has {x} {t}s and buys {y} more every day for {z} days. How many {t}s does {a} have then?",
    "A {t} costs ${x}. {a} buys {y} of them and {b} buys {z}. How much do they pay together?",
    "{a} and {b} share {n} {t}s so that {a} gets {x} more than {b}. How many does each of them get?",
    "{a} sells {x} {t}s on Monday, twice as many on Tuesday, and {y} on Wednesday. How many in all?",
    "{a} reads {x} pages an hour, {b} {y}. How many pages have both read after {z} hours?",
    "There are {n} {t}s in a shop. {x}% of them are sold, and {y} are broken. How many {t}s can {a} still buy?",
    "{a} walks {x} miles a day on weekdays and {y} miles on Sundays. How many miles is that in {z} weeks?",
    "{a} earns ${x} an hour and works {y} hours a week. After {z} weeks {a} spends ${n}. How much money is left?",
)


def read_turns(path: Path) -> list[list[tuple[str, str]]]:
    """-> the turns of each whole conversation, as (who, text)."""
    whole: Iterator[Any] = (record for record in read_records(str(path)) if record is not CUT_OFF)
    return [[(turn["from"], turn["value"]) for turn in record["conversations"]] for record in whole]


def passage(sentences: list[str], most: int, draw: random.Random) -> str:
    """Sentences in a row of together at most `most` characters."""
    text = ""
    for sentence in sentences[draw.randrange(max(1, len(sentences) // 2)) :]:
        if len(text) + len(sentence) > most:
            break
        text += sentence + " "
    return text.strip()


def tasks(turns: list[tuple[str, str]], draw: random.Random) -> Iterator[tuple[str, str]]:
    """-> (kind, prompt) of everything that a conversation gives."""
    for who, text in turns:
        if who in ("human", "user") and 8 <= len(text) <= 1500:
            yield "question", text
    prose = " ".join(" ".join(text.split()) for _, text in turns if "```" not in text)
    sentences = [one for one in SENTENCE.split(prose) if 20 <= len(one) <= 500]
    names = sorted(set(NAME.findall(" ".join(sentences))))
    if names:
        for name in draw.sample(names, min(2, len(names))):
            yield "qa", (question := draw.choice(SHORT).format(name))[0].upper() + question[1:]
    people, numbers = draw.sample(PEOPLE, 2), [draw.randint(2, 24) for _ in range(3)]
    words = {"a": people[0], "b": people[1], "t": draw.choice(THINGS), "n": 2 * draw.randint(20, 150)}
    yield "sum", draw.choice(SUMS).format(**words, **dict(zip("xyz", numbers, strict=True)))
    if len(text := passage(sentences, draw.randint(1000, 6500), draw)) > 700:
        yield "summary", draw.choice(SUMMARISE).format(text)
    if names and len(text := passage(sentences, draw.randint(2400, 3600), draw)) > 2000:
        inside = [name for name in names if name in text]
        if inside:
            yield "passage", f"{text}\n{draw.choice(ASK).format(draw.choice(inside))}"


def translations(sentences: list[str], draw: random.Random) -> Iterator[tuple[str, str]]:
    """-> (kind, prompt) for each sentence alone, and for each with another one behind it."""
    for one in sentences:
        for text in (one, f"{one} {draw.choice(sentences)}"):
            yield "translation", draw.choice(TRANSLATE).format(text)


def write(path: Path, prompts: Iterable[tuple[str, str]], most: dict[str, int], draw: random.Random) -> dict[str, int]:
    """Writes chat records of one user turn, with `group` for the kind, in random order. -> how many of each kind, at
    most most[kind]."""
    kinds: dict[str, dict[str, None]] = {}
    for kind, prompt in prompts:
        kinds.setdefault(kind, {})[prompt] = None
    records = []
    for kind, found in kinds.items():
        for prompt in draw.sample(list(found), min(len(found), most.get(kind, len(found)))):
            records.append({"messages": [{"role": "user", "content": prompt}], "group": kind})
    draw.shuffle(records)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return {kind: sum(record["group"] == kind for record in records) for kind in kinds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sharegpt", type=Path, help="ShareGPT_V3_unfiltered_cleaned_split.json")
    parser.add_argument("--german", type=Path, help="a text file of German sentences, one a line")
    parser.add_argument("--held_out", type=int, default=1000, help="the last so many conversations are for --eval")
    parser.add_argument("--train", required=True, type=Path, help="the prompts to train on")
    parser.add_argument("--eval", required=True, type=Path, help="60 held-out prompts of each kind")
    parser.add_argument("--most", type=json.loads, default={}, help='prompts of a kind at most: {"question": 34000}')
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, found = random.Random(options.seed), read_turns(options.sharegpt)
    german = options.german.read_text(encoding="utf-8").splitlines() if options.german else []
    draw.shuffle(german)
    for path, chats, sentences, most in (
        (options.train, found[: -options.held_out], german[len(german) // 20 :], options.most),
        (options.eval, found[-options.held_out :], german[: len(german) // 20], dict.fromkeys(KINDS, 60)),
    ):
        prompts = (task for turns in chats for task in tasks(turns, draw))
        print(path, write(path, chain(prompts, translations(sentences, draw)), most, draw))


if __name__ == "__main__":
    main()
