"""Source `llava_json`: LLaVA's training lists, as published.

Flows in: a JSON list of `{id, image (a path, a list, or absent), conversations: [{from: human | gpt, value}]}`, as LLaVA-Pretrain's
`blip_laion_cc_sbu_558k.json` and `llava_v1_5_mix665k.json` are, and the folder that their image paths are relative to. Flows out: a row
a record, in the list's order; images are paths below that folder (the manifest's `root`). Spec:

    file     the list, below the data root
    images   the folder of its images, below the data root (the list's own folder, or `images` in it: where the first ones lie)
    verify   decode: every image is decoded now (about a millisecond each, in parallel), so that none can stop a training stage later |
             header: only its header is read; an image whose data is cut short then stops the stage that meets it, by name
    rows     only the first n records

A record without image is text only (ShareGPT). What can't be used is left out and counted by reason: see `records.py` for turns,
`images.py` for images. Ids that occur more than once (COCO photos have several conversations) get `#2`, `#3`, ...; an image that is there
under another suffix (OCR-VQA) is used. Both are counted. Memory: 20 bytes a record, its id once, and one window of the list.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.files import below, check_keys, one_of
from datasets_ray.images import VERIFY, ImageError
from datasets_ray.jsonlist import read, records
from datasets_ray.prompts import RowError
from datasets_ray.records import MARK_ADDED, OTHER_SUFFIX, Checked, Names, conversation, numbered
from datasets_ray.rows import row
from datasets_ray.shards import Made, write_sharded

TRIED = 20
"""Images that are looked for where `images` isn't given."""


def name_of(record: Mapping[str, Any], number: int) -> str:
    """The release's own id, or the record's number where it has none."""
    own = record.get("id")
    return str(own) if own is not None and own != "" else f"record-{number:07d}"


def paths_of(record: Mapping[str, Any]) -> list[str]:
    """The record's image paths; none for a text-only record. Raises RowError."""
    image = record.get("image")
    if not image:
        return []
    paths = image if isinstance(image, list) else [image]
    if not all(isinstance(path, str) and path for path in paths):
        raise RowError("an image is no path")
    return paths


class Maker:
    """Rows of a range of records; picklable. bounds: int64[N, 2], each record's bytes in the file; counts: int32[N], see `Names.add`."""

    def __init__(self, file: Path, bounds: np.ndarray, counts: np.ndarray, root: Path, verify: str) -> None:
        self.file, self.bounds, self.counts, self.root, self.verify = file, bounds, counts, root, verify

    def __call__(self, start: int, stop: int) -> Made:
        made, checked = Made([]), Checked(self.root, self.verify)
        begin, end = int(self.bounds[start, 0]), int(self.bounds[stop - 1, 1])
        for number, record in enumerate(read(self.file, begin, end), start):
            name = numbered(name_of(record, number), int(self.counts[number]))
            try:
                listed = paths_of(record)
                messages, unmarked = conversation(record.get("conversations"), len(listed))
                images = [checked.place(path) for path in listed]
            except RowError as error:
                made.dropped.append((name, error.reason))
                continue
            except ImageError as error:
                made.dropped.append((error.detail, error.reason))
                continue
            made.substituted += [(name, MARK_ADDED)] * bool(unmarked)
            made.substituted += [(given, OTHER_SUFFIX) for given, found in zip(listed, images) if given != found]
            meta = {"id": record.get("id"), **({"file": listed[0] if len(listed) == 1 else listed} if listed else {})}
            made.rows.append(row(name, images=[{"path": path} for path in images], messages=messages, meta=meta))
        return made


def _root(spec: Mapping[str, Any], file: Path, data_root: str | None, seen: list[str]) -> Path:
    """The folder that the list's paths are relative to."""
    if spec.get("images") is not None:
        return below(spec, "images", data_root, folder=True)
    choices = [file.parent, file.parent / "images"]
    return max(choices, key=lambda folder: sum(os.path.exists(folder / path) for path in seen))


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    check_keys(spec, ["file", "images", "verify", "rows"])
    verify = one_of(spec, "verify", VERIFY)
    file = below(spec, "file", data_root)
    bounds, counts = array("q"), array("i")
    names, seen = Names(), list[str]()
    for number, (begin, end, record) in enumerate(islice(records(file), spec.get("rows"))):
        bounds.extend((begin, end))
        counts.append(names.add(name_of(record, number)))
        if len(seen) < TRIED and isinstance(record.get("image"), str):
            seen.append(record["image"])
    root = _root(spec, file, data_root, seen)
    maker = Maker(file, np.array(bounds, dtype=np.int64).reshape(-1, 2), np.array(counts, dtype=np.int32), root, verify)
    return write_sharded(len(counts), maker, Path(out), root=str(root), records=len(counts), renamed=names.counts(), verify=verify)
