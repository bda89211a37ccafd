"""The one row format that every source writes and every pipeline reads.

A *rows* artefact is a directory of Arrow IPC shards (memory-mapped, so that a seeded random order costs no read-ahead)
and a `manifest.json`. Captions, conversations, text documents and multiple-choice questions are all rows:

    caption   messages = [user "<image>", assistant "a small red flower"]
    chat      messages = [user "<image>\\nWhat ...?", assistant "...", user ..., assistant ...]
    text      messages = [text "a document, learned from end to end"]
    question  question + options (in the order they are shown) + answer; messages empty, the prompt is made at run time
    labelled  label only: an image and its class, what mining and zero-shot classification read
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from datasets_ray.errors import UserError
from datasets_ray.files import json_object

IMAGE = "<image>"
"""Where an image goes in a message's text; 0..n per row, in the order of `images`."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))),
        ("question", pa.string()),
        ("hint", pa.string()),
        ("options", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("label", pa.string()),
        ("meta", pa.string()),
    ]
)
"""`images`: encoded bytes, or a path below the manifest's `root`. `answer`: the letter of the right option (or free text).
`label`: the class name. `meta`: JSON object with whatever the source knows (family, category, source file ...)."""


def row(id: str, **fields: Any) -> dict[str, Any]:
    """A complete row from the fields given; `meta` may be a dict."""
    full: dict[str, Any] = {
        "id": id, "images": [], "messages": [], "question": "", "hint": "", "options": [], "answer": "", "label": "", "meta": "{}",
    }
    unknown = set(fields) - set(full)
    assert not unknown, f"not a row field: {sorted(unknown)}"
    full.update(fields)
    if not isinstance(full["meta"], str):
        full["meta"] = json.dumps(full["meta"], sort_keys=True)
    full["images"] = [{"bytes": i.get("bytes"), "path": i.get("path")} for i in full["images"]]
    return full


def write_shard(rows: Sequence[dict[str, Any]], directory: Path, name: str) -> dict[str, Any]:
    """Writes rows to `directory/name` (Arrow IPC file); returns its manifest entry: file, rows, sha256."""
    return write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), directory, name)


def write_table(table: pa.Table, directory: Path, name: str) -> dict[str, Any]:
    """`write_shard` for rows that are a table of `SCHEMA` already: image bytes are not copied through Python."""
    path = Path(directory) / name
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=1024)
    return {"file": name, "rows": table.num_rows, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_manifest(directory: Path, shards: Sequence[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """Writes `manifest.json`. facts: classes (list of names), dropped ({reason: count}), root (image folder) and anything to show."""
    manifest = {"rows": sum(s["rows"] for s in shards), "shards": list(shards), "dropped": {}, "root": None, "classes": [], **facts}
    (Path(directory) / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    return manifest


def write_rows(rows: Iterable[dict[str, Any]], directory: Path, **facts: Any) -> dict[str, Any]:
    """Small sets in one go: one shard and the manifest."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    return write_manifest(directory, [write_shard(list(rows), Path(directory), "rows-00000.arrow")], **facts)


def read_manifest(directory: Path) -> dict[str, Any]:
    path = Path(directory) / "manifest.json"
    if not path.is_file():
        raise UserError(f"{directory} holds no rows", why="manifest.json is missing", hint="point at what a dataset stage wrote")
    return json_object(path, "point at what a dataset stage wrote, or make it again")


class RowTable:
    """Random access to a rows artefact, memory-mapped: `len(t)`, `t[i]`, `t.take([i, ...])`, `t.column("label")`."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        tables = [pa.ipc.open_file(pa.memory_map(str(self.directory / s["file"]))).read_all() for s in self.manifest["shards"]]
        self.table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.table.slice(index, 1).to_pylist()[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()

    def take(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Rows at these positions, in this order."""
        return [self[int(i)] for i in indices]

    def column(self, name: str) -> list[Any]:
        return self.table.column(name).to_pylist()

    @property
    def root(self) -> Path | None:
        return Path(self.manifest["root"]) if self.manifest.get("root") else None


@lru_cache(maxsize=64)
def open_rows(directory: str) -> RowTable:
    """The table of a finished (immutable) artefact, opened once per process."""
    return RowTable(directory)
