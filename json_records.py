"""Records of a JSON file one by one: an array that is cut off still gives its whole records."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from errors import BadInput

CUT_OFF = object()  # read_json's last word on an array whose end is missing


def read_json(path: str) -> Iterator[object]:
    """The records of a JSON array or of JSON lines, whichever the file's first character says.

    An array that is cut off yields its whole records, then CUT_OFF. Raises BadInput on a syntax error.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            raise BadInput(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
        text = data[: error.start].decode("utf-8-sig")  # cut in the middle of the last character
    if not text.strip():
        raise BadInput(f"{path} is empty: it should hold conversations, see docs/data.md")
    if text.lstrip()[0] != "[":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise BadInput(f"{path}, line {number}: not valid JSON ({error}): mend or delete it") from error
        return
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    at, end, number = text.index("[") + 1, len(text.rstrip()), 0
    while True:
        at = between.match(text, at).end()
        if at >= end:
            yield CUT_OFF
            return
        if text[at] == "]":
            if at + 1 < end:
                line = text.count("\n", 0, at) + 1
                raise BadInput(
                    f"{path}, line {line}: the array ends here, but the file goes on: keep one array a file"
                )
            return
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            # What a cut can leave: a string without end, an error at the very end, or half a word ("fal", "\\u00e").
            half_a_word = error.pos >= end - 6 and text[end - 1] not in "]}"
            if error.msg.startswith("Unterminated string") or error.pos >= end or half_a_word:
                yield CUT_OFF
                return
            where = f"{path}, line {error.lineno}: record {number + 1}"
            raise BadInput(f"{where} is not valid JSON ({error.msg}): mend or delete it") from error
        number += 1
        yield record
