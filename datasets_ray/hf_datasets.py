"""Source `hf_datasets`: what Hugging Face `datasets` writes to disk, read with pyarrow alone.

Flows in: a folder of `Dataset.save_to_disk` (`state.json` and Arrow files; with `dataset_dict.json` a folder per split), or Parquet files
as the hub holds them. Flows out: caption or conversation rows, in file order. Spec:

    folder         the saved folder, below the data root
    files          or: Parquet or Arrow files, a folder or a pattern, below the data root
    split          of a saved dictionary of splits (train)
    image          column of the image: the Image feature {bytes, path}, bytes, or a path (`image` where there is one)
    text           column of the caption
    conversations  or: column of the turns, [{from, value}] or [{role, content}]
    id             column of the ids (`id` where there is one)
    images         folder that paths in the image column are relative to, below the data root (the saved folder)
    verify, rows   as in `llava_json`

Images held as bytes are copied into the rows. A record without image is text only in conversations, and dropped among captions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.columns import Columns
from datasets_ray.errors import UserError, nearest
from datasets_ray.files import below, check_keys, matching, one_of
from datasets_ray.images import VERIFY, ImageError, verdict
from datasets_ray.prompts import RowError
from datasets_ray.records import MARK_ADDED, OTHER_SUFFIX, Checked, Names, caption, conversation, numbered
from datasets_ray.rows import row
from datasets_ray.shards import Made, write_sharded

SHARD = 128
"""Items per shard: rows hold their images' bytes."""
KEYS = ["folder", "files", "split", "image", "text", "conversations", "id", "images", "verify", "rows"]


def saved_files(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a folder that `save_to_disk` wrote, in order. UserError for one that isn't, or that has lost a file."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits") or []
        if split not in splits:
            raise UserError(f"{folder} has no split {split!r}", hint=nearest(split, splits))
        folder /= split
    if not (folder / "state.json").is_file():
        hint = "for Parquet files say `files: FOLDER` instead of `folder`"
        raise UserError(f"{folder} is not what save_to_disk writes", why="state.json is missing", hint=hint)
    state = _json(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(f"{folder} keeps its rows' order in another file", hint="save it again after dataset.flatten_indices()")
    names = [str(entry.get("filename")) for entry in state.get("_data_files") or []]
    paths = [folder / name for name in names]
    for path in paths:
        if path.parent != folder or not path.is_file():
            raise UserError(f"{folder} has lost {path.name}", why="state.json names it", hint="copy the whole folder again")
    return paths


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON", why=str(error), hint="copy the whole folder again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is no JSON object", hint="copy the whole folder again")
    return data


class Maker:
    """Rows of a range of records; picklable. names: column of each part; ids, counts: see `Names.add`."""

    def __init__(self, columns: Columns, names: Mapping[str, str], ids: list[str], counts: np.ndarray, root: Path, verify: str) -> None:
        self.columns, self.names, self.ids, self.counts = columns, dict(names), ids, counts
        self.root, self.verify = root, verify

    def __call__(self, start: int, stop: int) -> Made:
        made, checked = Made([]), Checked(self.root, self.verify)
        wanted = sorted({name for key, name in self.names.items() if key != "id"})
        for number, record in enumerate(self.columns.read(start, stop, wanted), start):
            name = numbered(self.ids[number], int(self.counts[number])) if self.ids else f"record-{number:07d}"
            try:
                images = self._images(record, checked, made)
                if "text" in self.names:
                    if len(images) != 1:
                        raise RowError("no image" if not images else "a caption of several images")
                    messages, unmarked = caption(record[self.names["text"]]), 0
                else:
                    messages, unmarked = conversation(record[self.names["conversations"]], len(images))
            except (RowError, ImageError) as error:
                made.dropped.append((name, error.reason))
                continue
            made.substituted += [(name, MARK_ADDED)] * bool(unmarked)
            made.rows.append(row(name, images=images, messages=messages, meta={"id": self.ids[number]} if self.ids else {}))
        return made

    def _images(self, record: Mapping[str, Any], checked: Checked, made: Made) -> list[dict[str, Any]]:
        """The record's images, each looked at. Raises ImageError."""
        value = record.get(self.names.get("image", ""))
        values = value if isinstance(value, list) else [value]
        images = []
        for one in values:
            image = one if isinstance(one, dict) else {"bytes": one} if isinstance(one, bytes) else {"path": one}
            if image.get("bytes") is not None:
                if reason := verdict(image, None, self.verify):
                    raise ImageError(reason)
                images.append({"bytes": image["bytes"]})
            elif path := str(image.get("path") or ""):
                found = checked.place(path)
                made.substituted += [(path, OTHER_SUFFIX)] * (found != path)
                images.append({"path": found})
        return images


def _names(spec: Mapping[str, Any], columns: Columns) -> dict[str, str]:
    """Key → column, each there and of a type that fits."""
    if ("text" in spec) == ("conversations" in spec):
        why = f"the files have {', '.join(columns.types) or 'no columns'}"
        raise UserError("source 'hf_datasets' needs one of `text` and `conversations`", why=why, hint="text: COLUMN of the captions")
    image = ("struct<bytes: ", "struct<path: ", "binary", "large_binary", "string", "large_string", "list<", "large_list<")
    text, turns = ("string", "large_string"), ("list<", "large_list<")
    kinds = {"image": image, "text": text, "conversations": turns, "id": (*text, "int")}
    names = {key: str(spec[key]) for key in kinds if key in spec}
    names |= {key: key for key in ("image", "id") if key not in names and key in columns.types}
    return {key: columns.need(key, name, kinds[key]) for key, name in names.items()}


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    check_keys(spec, KEYS)
    verify = one_of(spec, "verify", VERIFY)
    if ("folder" in spec) == ("files" in spec):
        hint = "folder: what save_to_disk wrote, or files: *.parquet"
        raise UserError("source 'hf_datasets' needs one of `folder` and `files`", hint=hint)
    if "folder" in spec:
        folder = below(spec, "folder", data_root, folder=True)
        paths = saved_files(folder, spec.get("split", "train"))
    else:
        if "split" in spec:
            raise UserError("`split` goes with `folder`", why="files are named by split", hint="files: data/train-*.parquet")
        paths = matching(spec, "files", data_root, (".parquet", ".arrow"))
        folder = paths[0].parent
    root = below(spec, "images", data_root, folder=True) if "images" in spec else folder
    columns = Columns(paths)
    names = _names(spec, columns)
    count = min(len(columns), spec.get("rows") or len(columns))
    ids, numbers = [], Names()
    if "id" in names:
        ids = [f"record-{at:07d}" if one is None else str(one) for at, one in enumerate(columns.column(names["id"], count))]
    counts = np.array([numbers.add(one) for one in ids], dtype=np.int32)
    maker = Maker(columns, names, ids, counts, root, verify)
    facts = {"records": len(columns), "renamed": numbers.counts(), "verify": verify}
    return write_sharded(count, maker, Path(out), SHARD, root=str(root), **facts)
