"""A JSON list of records in one large file, read a window at a time: LLaVA's mix-665K is 1 GB of it.

In: a file that holds `[{...}, {...}, ...]` in UTF-8. Out: its records one by one with their byte ranges (`records`), and the records
of a range again (`read`), so that shards are made in parallel. Memory: one window of text and one record.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from datasets_ray.errors import UserError
from datasets_ray.files import must_be_data

WINDOW = 8 << 20
"""Bytes that are decoded at a time."""
LONGEST = 256 << 20
"""A record may have so many bytes; a larger one is a missing bracket."""
_BETWEEN = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"


def records(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(first byte, byte after the last, record) of each. UserError with record and byte where the file is cut short or no JSON list."""
    must_be_data(path)
    size, number, window = path.stat().st_size, 0, WINDOW
    with path.open("rb") as file:
        at = _opening(file, path)
        while True:
            file.seek(at)
            data = file.read(window)
            last = at + len(data) >= size
            text = _text(data, at, last, path)
            plain, done, place = text.isascii(), 0, at
            while True:
                between = _BETWEEN.match(text, done)
                assert between is not None
                begin = between.end()
                if begin == len(text):
                    break
                if text[begin] == "]" and not between[1]:
                    _closing(file, place + begin - done + 1, path)
                    return
                if text[begin] != "{" or bool(between[1]) != bool(number):
                    raise _broken(path, number, place + begin - done, "a record `{...}` and a comma were expected")
                try:
                    record, end = _DECODER.raw_decode(text, begin)
                except json.JSONDecodeError as error:
                    if last or len(data) > LONGEST:
                        raise _broken(path, number, place + begin - done, error.msg) from None
                    break
                except RecursionError:
                    raise _broken(path, number, place + begin - done, "brackets nested too deep") from None
                start = place + begin - done
                place = start + (end - begin if plain else len(text[begin:end].encode()))
                yield start, place, record
                number, done = number + 1, end
            if last:
                raise _broken(path, number, size, "the list has no end: the file is cut short")
            window = WINDOW if done else window * 2
            at = place


_DECODER = json.JSONDecoder()


def read(path: Path, start: int, stop: int) -> list[dict[str, Any]]:
    """The records between these two bytes, as `records` gave them out."""
    if stop <= start:
        return []
    with path.open("rb") as file:
        file.seek(start)
        return json.loads(b"[" + file.read(stop - start) + b"]")


def _opening(file: BinaryIO, path: Path) -> int:
    """The byte after the list's `[`."""
    head = file.read(4096)
    text = head.removeprefix(_BOM).lstrip()
    if not text.startswith(b"["):
        hint = "one list `[{...}, {...}]`, as LLaVA's releases have it"
        raise UserError(f"{path} is not a JSON list", why=f"it begins with {text[:20]!r}", hint=hint)
    return len(head) - len(text) + 1


def _text(data: bytes, at: int, last: bool, path: Path) -> str:
    """The window as text, without a character that its end cuts in two."""
    try:
        return codecs.utf_8_decode(data, "strict", last)[0]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8", why=f"byte {at + error.start}: {error.reason}", hint="download it again") from None


def _closing(file: BinaryIO, at: int, path: Path) -> None:
    file.seek(at)
    if file.read(4096).strip():
        raise UserError(f"{path} goes on after its list", why=f"byte {at}", hint="one list a file")


def _broken(path: Path, number: int, byte: int, why: str) -> UserError:
    hint = "download it again, and compare its size with the release's"
    return UserError(f"{path} is no whole JSON list", why=f"record {number}, byte {byte}: {why}", hint=hint)
