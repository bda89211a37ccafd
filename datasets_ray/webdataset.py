"""Source `webdataset`: tar archives of images and their texts, as `webdataset` and `img2dataset` write them.

Flows in: uncompressed tars; the members of a sample share their name up to the first dot (`000012.jpg`, `000012.txt`). Flows out: caption
or conversation rows in the order of archives and samples, with the images' bytes in them. Spec:

    files   the archives: one, a folder or a pattern, below the data root
    text    txt: a member with the caption | json: a member with an object
    field   with json: the key of the caption, or of the turns [{from, value}] (caption)
    verify, rows   as in `llava_json`

A sample without image or text, with two images, or with a name that leads out of the archive is dropped and counted; nothing is unpacked.
A cut or damaged archive is an error (see `tarindex.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_ray.files import check_keys, matching, one_of
from datasets_ray.images import VERIFY, ImageError, verdict
from datasets_ray.prompts import RowError
from datasets_ray.records import MARK_ADDED, caption, conversation
from datasets_ray.rows import row
from datasets_ray.shards import Made, write_sharded
from datasets_ray.tarindex import Sample, samples

SHARD = 128
"""Items per shard: rows hold their images' bytes."""
IMAGES = ("jpg", "jpeg", "png", "webp")
LONGEST_TEXT = 16 << 20


@dataclass(frozen=True)
class Entry:
    """A sample: its archive's number, its key, where image and text lie (None: it has none), and why it can't be used."""

    archive: int
    key: str
    image: tuple[int, int] | None
    text: tuple[int, int] | None
    problem: str


def entry_of(archive: int, sample: Sample, text: str) -> Entry:
    images = [sample.parts[suffix] for suffix in IMAGES if suffix in sample.parts]
    problem = sample.problem or ("two images" if len(images) > 1 else "")
    return Entry(archive, sample.key, images[0] if images else None, sample.parts.get(text), problem)


class Maker:
    """Rows of a range of entries; picklable."""

    def __init__(self, archives: Sequence[Path], entries: Sequence[Entry], field: str | None, verify: str) -> None:
        self.archives, self.entries, self.field, self.verify = list(archives), list(entries), field, verify

    def __call__(self, start: int, stop: int) -> Made:
        made = Made([])
        for entry in self.entries[start:stop]:
            archive = self.archives[entry.archive]
            name = f"{archive.stem}/{entry.key}"
            try:
                if entry.problem:
                    raise RowError(entry.problem)
                images = [] if entry.image is None else [{"bytes": _bytes(archive, entry.image)}]
                messages, unmarked = self._messages(archive, entry, len(images))
                for image in images:
                    if reason := verdict(image, None, self.verify):
                        raise ImageError(reason)
            except (RowError, ImageError) as error:
                made.dropped.append((name, error.reason))
                continue
            made.substituted += [(name, MARK_ADDED)] * bool(unmarked)
            made.rows.append(row(name, images=images, messages=messages, meta={"file": archive.name, "key": entry.key}))
        return made

    def _messages(self, archive: Path, entry: Entry, images: int) -> tuple[list[dict[str, str]], int]:
        if entry.text is None:
            raise RowError("no text")
        if entry.text[1] > LONGEST_TEXT:
            raise RowError("text too long")
        try:
            text = _bytes(archive, entry.text).decode("utf-8")
            told: Any = text.strip() if self.field is None else json.loads(text)
        except ValueError:
            raise RowError("text is no UTF-8" if self.field is None else "text is no JSON") from None
        if self.field is not None:
            if not isinstance(told, dict) or self.field not in told:
                raise RowError(f"no {self.field!r} in its JSON")
            told = told[self.field]
        if isinstance(told, list):
            return conversation(told, images)
        if not images:
            raise RowError("no image")
        return caption(told), 0


def _bytes(archive: Path, place: tuple[int, int]) -> bytes:
    with archive.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    check_keys(spec, ["files", "text", "field", "verify", "rows"])
    verify, text = one_of(spec, "verify", VERIFY), one_of(spec, "text", ("txt", "json"))
    archives = matching(spec, "files", data_root, (".tar",))
    entries: list[Entry] = []
    rows, facts = spec.get("rows"), dict[str, Any]()
    for number, archive in enumerate(archives):
        entries += [entry_of(number, sample, text) for sample in samples(archive)]
        if rows is not None and len(entries) >= rows:
            entries = entries[:rows]
            break
    else:
        facts["records"] = len(entries)
    maker = Maker(archives, entries, spec.get("field", "caption") if text == "json" else None, verify)
    return write_sharded(len(entries), maker, Path(out), SHARD, verify=verify, **facts)
