"""Compares plain decoding with decoding with heads: the speed-up, and both texts side by side."""

import shutil
import textwrap
from itertools import islice, zip_longest

import torch

from common.terminal import markdown
from decoding.answers import Decoded


def token_texts(tokens: list[int], tokenizer) -> list[str]:
    """What each token adds to the text. A character made of several tokens appears with the last of them."""
    texts, shown = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        if end < len(tokens):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(shown) :])
        shown = text if len(text) > len(shown) else shown
    return texts


def pieces_of(answer: list[int], lengths: list[int], tokenizer, mark: str) -> str:
    """An answer's text, with a mark between passes."""
    texts = iter(token_texts(answer, tokenizer))
    return mark.join("".join(islice(texts, length)) for length in (1, *lengths))


def side_by_side(left: str, right: str, width: int) -> str:
    """Two texts in two columns."""
    width = (width - 3) // 2
    columns = []
    for text in (left, right):
        lines = (textwrap.wrap(line, width, drop_whitespace=False) or [""] for line in text.splitlines())
        columns.append([line for wrapped in lines for line in wrapped])
    return "\n".join(f"{a:{width}} | {b}".rstrip() for a, b in zip_longest(*columns, fillvalue=""))


def by_group(plain: Decoded, heads: Decoded, groups: list[str]) -> list[dict]:
    """One row for each group of prompts, in the order in which they come first. groups: each prompt's."""
    rows = []
    for name in dict.fromkeys(groups):
        numbers = [i for i, group in enumerate(groups) if group == name]
        base, found = plain.only(numbers), heads.only(numbers)
        slow, fast = base.figures(), found.figures()
        row = {"group": name, "prompts": len(numbers), "tokens per pass": fast["tokens_per_pass"]}
        row |= {"speed-up": fast["tokens_per_s"] / slow["tokens_per_s"] if slow["tokens_per_s"] else 1.0}
        rows.append(row | {"identical": sum(map(list.__eq__, base.answers, found.answers))})
    return rows


def compare(plain: Decoded, heads: Decoded, tokenizer, dtype: torch.dtype, greedy: bool) -> tuple[str, dict]:
    """-> (a report for the terminal, its figures)."""
    rows = [{"decoding": one.name} | one.figures() for one in (plain, heads)]
    speed_up = rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"] if rows[0]["tokens_per_s"] else 1.0
    same = [a == b for a, b in zip(plain.answers, heads.answers, strict=True)]
    text = []
    if greedy:
        text.append(f"identical texts: {sum(same)} of {len(same)}")
        if not all(same) and dtype != torch.float32:
            text.append(
                f"(in {str(dtype).removeprefix('torch.')} a pass of one token and a pass of many round differently, "
                "so where two tokens are almost equally likely either may win: --agree or --dtype float32 decides it)"
            )
    text.append(
        f"{rows[1]['tokens']} tokens in {rows[1]['passes']} passes of the backbone; plainly {rows[0]['passes']}"
    )
    text.append(f"speed-up: {speed_up:.2f}")
    if rows[0]["passes"] and rows[1]["passes"]:
        longer = rows[1]["seconds"] / rows[1]["passes"] * rows[0]["passes"] / rows[0]["seconds"]
        text[-1] += (
            f" (a pass took {longer:.2f} times as long as a plain one, so it has to yield more tokens than that)"
        )
    left = f"{plain.name}\n\n" + tokenizer.decode(plain.answers[0], skip_special_tokens=True)
    right = f"{heads.name}; | between passes\n\n" + pieces_of(heads.answers[0], heads.pieces[0], tokenizer, "|")
    text += ["\n" + markdown(rows), "\n" + side_by_side(left, right, shutil.get_terminal_size((120, 40)).columns)]
    return "\n".join(text), {"speed_up": speed_up, "identical": sum(same), "plain": rows[0], "heads": rows[1]}
