"""Reads files of JSON in blocks: a large one is never in memory as a whole.

The content says what a file is, not its name: lines of JSON, one array (also one that is cut off), objects one after
another in any layout, or one object around the list of records; packed with gzip or not.
"""

import itertools
import json
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from common.errors import BadInput, first_line
from conversations.records import CUT_OFF, FIELDS

BLOCK = 8 << 20  # bytes
BETWEEN = re.compile(r"[\s,]*")  # records
UNPACKED = '{"'  # stands at the end of a packed file that is cut off: the start of a record


class Lines(NamedTuple):
    """A block of whole lines of JSON, one record each."""

    data: bytes
    start: int  # the bytes of the file before it, unpacked
    last: bool  # the file ends here, without a line end


def read_json(path: str) -> Iterator[Lines | list]:
    """The records of a file: as lines that are not parsed yet, or as lists of records."""
    chunks = read_chunks(path)
    head = next(chunks, b"")
    whole = itertools.chain([head], chunks)
    yield from _in_lines(whole) if _is_lines(head) else in_lists(_scan(path, decode(path, whole)))


def read_chunks(path: str) -> Iterator[bytes]:
    """The bytes of a text file, unpacked, and without what marks them as UTF-8."""
    chunks = _unpack(path)
    head = b""
    while len(head) < 4 and (chunk := next(chunks, b"")):
        head += chunk
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head[:4]:
        raise BadInput(f"{path} is UTF-16 text, or no text at all: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    yield head.removeprefix(b"\xef\xbb\xbf")
    yield from chunks


def _unpack(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            while chunk := file.read(BLOCK):
                yield chunk
            return
        unpacker = zlib.decompressobj(31)  # 31: with gzip's header
        while chunk := file.read(BLOCK // 8):
            while chunk:
                if unpacker.eof:  # several packed files in one
                    unpacker = zlib.decompressobj(31)
                if text := unpacker.decompress(chunk):
                    yield text
                chunk = unpacker.unused_data
        if not unpacker.eof:
            yield UNPACKED.encode()


def decode(path: str, chunks: Iterator[bytes]) -> Iterator[str]:
    """Half a character at the very end is left out."""
    done, pending = 0, b""
    for chunk in chunks:
        data = pending + chunk
        try:
            text, pending = data.decode(), b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                raise BadInput(f"{path} is not UTF-8 text (byte {done + error.start}): convert it first") from error
            text, pending = data[: error.start].decode(), data[error.start :]
        done += len(data) - len(pending)
        yield text


def in_lists(records: Iterator) -> Iterator[list]:
    while some := list(itertools.islice(records, 1000)):
        yield some


def _is_lines(head: bytes) -> bool:
    """Is the first line a whole record?"""
    try:
        record = json.loads(head.lstrip().split(b"\n", 1)[0].decode())
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and _wrapped(record) is None


def _wrapped(record: object) -> list | None:
    """The records in an object around them, such as `{"version": 1, "data": [...]}`."""
    if not isinstance(record, dict) or FIELDS & record.keys():
        return None
    lists = [v for v in record.values() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)]
    return lists[0] if len(lists) == 1 else None


def _in_lines(chunks: Iterator[bytes]) -> Iterator[Lines]:
    start = 0
    rest: list[bytes] = []  # the pieces of a line that has not ended yet
    for chunk in chunks:
        if cut := chunk.rfind(b"\n") + 1:
            data = b"".join([*rest, memoryview(chunk)[:cut]])
            yield Lines(data, start, False)
            start, rest = start + len(data), []
        rest.append(chunk[cut:])
    if data := b"".join(rest):
        yield Lines(data, start, True)


def parse_lines(path: str, lines: Lines) -> Iterator[object]:
    """The records of a block of lines, then CUT_OFF if the file ends within one."""
    texts = lines.data.rstrip().split(b"\n")
    for index, text in enumerate(texts):
        at_end = lines.last and index + 1 == len(texts)
        try:
            if text.strip():
                yield json.loads(text.decode())
        except UnicodeDecodeError as error:
            if not at_end or error.reason != "unexpected end of data":
                what = f"not UTF-8 text (byte {error.start} of it): convert the file first"
                raise BadInput(f"{path}, line {_line_number(path, lines, index)}: {what}") from error
            yield CUT_OFF
        except json.JSONDecodeError as error:
            if not at_end or not _is_cut(error):
                what = f"not valid JSON ({error}): mend or delete it"
                raise BadInput(f"{path}, line {_line_number(path, lines, index)}: {what}") from error
            yield CUT_OFF
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists ...
            what = f"JSON that cannot be read ({first_line(error)}): delete it"
            raise BadInput(f"{path}, line {_line_number(path, lines, index)}: {what}") from error


def _line_number(path: str, lines: Lines, index: int) -> int:
    """Lines are only counted when one is broken: that takes as long as to read them."""
    before, left = 0, lines.start
    for chunk in read_chunks(path):
        before += chunk.count(b"\n", 0, left)
        left = max(left - len(chunk), 0)
    return before + index + 1


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Is the end missing? A cut can leave a string without end, an error at the very end, or half a word ("fal",
    "\\u00e")."""
    text = error.doc.rstrip()
    half_a_word = error.pos >= len(text) - 6 and text[-1] not in "]}"
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) or half_a_word


class _Window:
    """The part of a text that is being read."""

    def __init__(self, texts: Iterator[str]):
        self.texts, self.text, self.at, self.line, self.ended = texts, "", 0, 1, False

    def more(self):
        """Forgets what stands before `at` and reads on: at least as much again as is left, so that a large record is
        not parsed over and over."""
        self.line += self.text.count("\n", 0, self.at)
        pieces, want = [self.text[self.at :]], len(self.text) - self.at
        while want >= 0 and not self.ended:
            piece = next(self.texts, None)
            self.ended = piece is None
            pieces.append(piece or "")
            want -= len(pieces[-1]) + 1
        self.text, self.at = "".join(pieces), 0
        if self.ended:
            self.text = self.text.rstrip()

    def skip_gap(self) -> bool:
        """Goes to the next thing to read. False if there is none."""
        while True:
            gap = BETWEEN.match(self.text, self.at)
            assert gap  # the pattern matches any text
            self.at = gap.end()
            if self.at < len(self.text) or self.ended:
                return self.at < len(self.text)
            self.more()

    def line_of(self, offset: int) -> int:
        return self.line + self.text.count("\n", 0, offset)


def _scan(path: str, texts: Iterator[str]) -> Iterator[object]:
    """The records of an array (the text starts with "[") or of objects one after another, then CUT_OFF if the last one
    or the end of the array is missing."""
    window, decoder = _Window(texts), json.JSONDecoder()
    if not window.skip_gap():
        raise BadInput(f"{path} is empty: it should hold conversations, see docs/data.md")
    start = window.text[window.at]
    if start not in "[{":
        raise BadInput(
            f"{path} is no file of conversations: it begins with {window.text[window.at :][:10]!r}, not with the [ or "
            "{ of JSON, and is neither .parquet nor .csv"
        )
    window.at += start == "["
    number = 0
    while window.skip_gap():
        text, at = window.text, window.at
        if start == "[" and text[at] == "]":
            rest = itertools.chain([text[at + 1 :]], window.texts)
            behind = next((piece.strip() for piece in rest if piece.strip()), "")
            if behind == UNPACKED:
                break
            if behind:
                where = f"{path}, line {window.line_of(at)}"
                raise BadInput(f"{where}: the array ends here, but the file goes on: keep one array a file")
            return
        try:
            record, window.at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            if _is_cut(error):
                if window.ended:
                    break
                window.more()
                continue
            where = f"{path}, line {window.line_of(error.pos)}: "
            which = f"record {number + 1} is " if start == "[" or number else ""
            raise BadInput(f"{where}{which}not valid JSON ({error.msg}): mend or delete it") from error
        except (ValueError, RecursionError) as error:
            where = f"{path}, line {window.line_of(at)}: record {number + 1}"
            raise BadInput(f"{where} is JSON that cannot be read ({first_line(error)}): delete it") from error
        if window.at == len(text) and not window.ended and not isinstance(record, dict):
            window.at = at  # it may be half a number
            window.more()
            continue
        number += 1
        if start == "{" and number == 1 and (records := _wrapped(record)) and not window.skip_gap():
            yield from records
            return
        yield record
    else:
        if start == "{":
            return
    yield CUT_OFF
