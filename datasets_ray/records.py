"""From a published record to a row: its turns, its caption, its id, its images. Shared by the readers of published training data.

In: what a release holds (LLaVA's `conversations`, a caption, an image path or bytes). Out: a row's parts, or RowError / ImageError with
the reason under which the record is counted as dropped.

Where LLaVA-1.5 (`train.py`) and this differ: a record whose turns don't alternate stops LLaVA with an assertion and is dropped here; a
first turn by the model is cut off there, and the record is dropped here; an image that no `<image>` marks runs through LLaVA's encoder
and is then thrown away, here it goes in front of the first question. Each is counted. In a record without images, `<image>` is a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from datasets_ray.images import ImageError, resolve, verdict
from datasets_ray.prompts import RowError
from datasets_ray.rows import IMAGE

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".JPG", ".JPEG", ".PNG", ".GIF")
"""What an image may be called instead: OCR-VQA's downloads keep their own suffix, LLaVA's list calls all of them .jpg."""

MARK_ADDED = "image that no <image> marks put first"
OTHER_SUFFIX = "image found under another suffix"
RENAMED = "duplicate id renamed"


def conversation(turns: Any, images: int) -> tuple[list[dict[str, str]], int]:
    """Messages of `[{from: human | gpt, value}, ...]` (or `{role, content}`), and for how many images a mark was put first.

    images: how many the record has. `<image>` stays where it stands; the template moves it where the language model wants it.
    Raises RowError for turns that aren't human, gpt, human, ..., for an empty answer, and for more marks than images.
    """
    if not isinstance(turns, list) or not turns:
        raise RowError("no conversation")
    messages: list[dict[str, str]] = []
    for index, turn in enumerate(turns):
        who, text = _turn(turn)
        expected = ("user", "assistant")[index % 2]
        if who != expected:
            raise RowError("turns don't alternate" if index else "the first turn isn't the human's")
        if who == "assistant" and not (text.replace(IMAGE, "") if images else text).strip():
            raise RowError("an answer is empty")
        messages.append({"role": who, "text": text})
    if len(messages) < 2:
        raise RowError("nothing is answered")
    if not images:
        return messages, 0
    marks = sum(m["text"].count(IMAGE) for m in messages if m["role"] == "user")
    if marks > images:
        raise RowError("more <image> marks than images")
    unmarked = images - marks
    messages[0]["text"] = f"{IMAGE}\n" * unmarked + messages[0]["text"]
    return messages, unmarked


def _turn(turn: Any) -> tuple[str, str]:
    """(role, text) of a turn in either spelling."""
    if not isinstance(turn, Mapping):
        raise RowError("a turn is no record")
    who, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(text, str):
        raise RowError("a turn has no text")
    if who not in ROLES:
        raise RowError("a role is neither human nor gpt")
    return ROLES[who], text


def caption(text: Any) -> list[dict[str, str]]:
    """Messages of an image with its caption; RowError when there is no text."""
    if not isinstance(text, str) or not text.strip():
        raise RowError("no caption")
    return [{"role": "user", "text": IMAGE}, {"role": "assistant", "text": text}]


class Names:
    """Row ids from a release's own: the second record called `x` becomes `x#2`. renamed: how many were."""

    def __init__(self) -> None:
        self.renamed = 0
        self._seen: dict[str, int] = {}

    def add(self, name: str) -> int:
        """1 when the name is new, else the number that its `#` gets."""
        count = self._seen.get(name, 0) + 1
        while count > 1 and numbered(name, count) in self._seen:
            count += 1
        self._seen[name] = count
        if count > 1:
            self.renamed += 1
            self._seen[numbered(name, count)] = 1
        return count

    def counts(self) -> dict[str, int]:
        """For the manifest: `{"duplicate id renamed": n}`, empty without any."""
        return {RENAMED: self.renamed} if self.renamed else {}


def numbered(name: str, count: int) -> str:
    return name if count < 2 else f"{name}#{count}"


class Checked:
    """Images below a root, each looked at once. verify: decode | header (see `images.verdict`)."""

    def __init__(self, root: Path, verify: str) -> None:
        self.root, self.verify = root, verify
        self._known: dict[str, tuple[str, str]] = {}

    def place(self, path: str) -> str:
        """The path under which the image is there: its own, or with another suffix. Raises ImageError when it can't be used."""
        if path not in self._known:
            found = self._found(path)
            self._known[path] = found, verdict({"path": found}, self.root, self.verify)
        found, reason = self._known[path]
        if reason:
            raise ImageError(reason, path)
        return found

    def _found(self, path: str) -> str:
        try:
            pure = PurePath(path)
            if not pure.name or resolve(path, self.root).exists():
                return path
            others = [str(pure.with_suffix(suffix)) for suffix in SUFFIXES]
            return next((other for other in others if (self.root / other).is_file()), path)
        except (ImageError, ValueError, OSError):
            return path  # `verdict` says what is wrong with it
