"""Source `vlmevalkit_tsv`: any benchmark in VLMEvalKit's TSV, with or without options, one image or several, vanilla or circular.

Flows in: a table with the columns `index`, `question`, `answer`, `image` (base64; a list of them; or, at most 64 characters long, the
index of the row whose image it shares) or `image_path`, and where the set has them `hint`, options `A`, `B` ..., `category`, `split`.
Flows out: question rows with image bytes (or paths). Keys:

    file         the table, below the data root or its LMUData
    images       folder that `image_path` is relative to (the table's)
    split        only rows of this split
    circular     each question once per rotation of its options, as VLMEvalKit's `CIRCULAR`: a question counts when all are answered right
    most_images  the first N images of a question; what is left out is counted
    open         rule for rows without options (open_answers.py); left out: yes_no where the answer is yes or no, else mmmu
    pair         columns whose equal values make a pair, such as [category, image_path] for MME
    text_only    keep rows without an image (they are left out and counted, as VLMEvalKit does)
    rows         the first questions

A table that holds rotated copies already (index + 1,000,000 a rotation, as MMBench's releases do) is taken at its word: with `circular`
they form the groups, without it only the originals are asked; a copy whose original isn't asked is left out and counted. Otherwise the i-th
rotation moves the i first options to the end; rows that CIRCULAR leaves alone (no options, an option that names option letters) are asked
once and counted.
Other deviations: an option that says `None` or `N/A` is an option (pandas reads it as absent there). Releases: MMBench_DEV_EN 4,329 rows,
MMMU_DEV_VAL 150 dev + 900 validation (53 of the 900 without options), MMStar 1,500, ScienceQA_TEST 2,017, AI2D_TEST 3,088, OCRBench 1,000,
MathVista_MINI 1,000, MM-Vet 218, POPE 9,000, MME 2,374, HallusionBench 951 with an image: checked by a data set's `expect`.
"""

from __future__ import annotations

import ast
import base64
import binascii
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from datasets_ray.files import below, check_keys
from datasets_ray.hallusion_places import places, together
from datasets_ray.images import ImageError
from datasets_ray.prompts import LETTERS
from datasets_ray.question_rows import Question, check_most, check_open, check_question, open_rule, question_row
from datasets_ray.shards import Made, write_sharded
from datasets_ray.tsv import Table

COPY = 1_000_000
"""A rotated copy's index is its original's plus this many for each rotation."""
REFERENCE = 64
"""An `image` of at most so many characters is another row's index (`image_base.py`)."""
SHARD_ROWS = 64
"""Rows hold their images: a task has a shard in memory."""
CUT = "images beyond most_images left out"
_NO_LETTER = re.compile(r"[^A-Za-z]")


@dataclass(frozen=True)
class Record:
    """A row of the table that is asked. byte, line: where it starts; image_of: the first byte of the row that has its images;
    together: how many questions are asked of the groups that it belongs to (hallusion_places)."""

    byte: int
    line: int
    index: str
    options: int
    fixed: bool
    image_of: int
    together: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One question as it is asked. rotation, of: which of its group's rotations it is and how many there are, 0 outside a group.

    moved: how many options go from the front to the end; none in a copy that the table itself holds.
    """

    record: int
    id: str
    rotation: int = 0
    group: str = ""
    of: int = 0
    moved: int = 0


def _names_letters(options: Sequence[str]) -> bool:
    """Whether an option speaks of option letters, so that rotating would change its meaning (`abnormal_entry` of CIRCULAR)."""
    letters = LETTERS[: len(options)]
    words = [set(_NO_LETTER.sub(" ", text).split()) for text in options]
    return any(len(said & set(letters)) > 1 or text in LETTERS for said, text in zip(words, options))


def listed(text: str) -> list[str]:
    """A cell's values: the members of a written list, else the cell itself."""
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [text]
    return [str(value) for value in values] if isinstance(values, list) and values else [text]


class Reader:
    """What a cell means, by the spec; picklable."""

    def __init__(self, table: Table, spec: Mapping[str, Any], folder: Path) -> None:
        self.table, self.folder, self.open = table, folder, check_open(spec)
        self.pair = [spec["pair"]] if isinstance(spec.get("pair"), str) else list(spec.get("pair") or [])
        self.letters = [letter for letter in LETTERS if letter in table.columns]
        if self.letters != list(LETTERS[: len(self.letters)]):
            raise UserError(f"{table.path} has option columns {', '.join(self.letters)}", why="they are A, B, C ... without a gap")
        self.embedded = "image" in table.columns
        table.require(["index", "question", "answer", *([] if self.embedded else ["image_path"]), *self.pair])

    def question(self, cells: Mapping[str, str], where: str) -> Question:
        """The question without its images."""
        given = [cells[letter] for letter in self.letters]
        options = [text for text in given if text.strip()]
        if [bool(text.strip()) for text in given] != [True] * len(options) + [False] * (len(given) - len(options)):
            why = "options are A, B, C ... without a gap"
            raise UserError(f"option {LETTERS[[bool(text.strip()) for text in given].index(False)]} is missing", why=why, where=where)
        answer: str | list[str] = cells["answer"].strip() if options else listed(cells["answer"].strip())
        meta = {"index": cells["index"], **{name.replace("-", "_"): cells.get(name) for name in ("category", "l2-category", "split")}}
        meta |= places(cells)
        if self.pair:
            meta["pair"] = "/".join(cells[column] for column in self.pair)
        rule = "" if options else open_rule([answer] if isinstance(answer, str) else answer, self.open)
        asked = Question(cells["question"], answer, options, cells.get("hint", ""), (), rule, meta)
        check_question(asked, where)
        return asked

    def images(self, cells: Mapping[str, str]) -> list[dict[str, Any]]:
        """The images of the row that holds them. Raises ImageError."""
        if not self.embedded or not cells["image"]:
            return [{"path": path} for path in listed(cells.get("image_path", ""))]
        return [{"bytes": _bytes(text)} for text in listed(cells["image"])]

    def has_image(self, cells: Mapping[str, str]) -> bool:
        return bool(self.embedded and cells["image"].strip() or cells.get("image_path", "").strip())


def _bytes(text: str) -> bytes:
    data = text.rsplit("base64,", 1)[-1] if text.startswith("data:") else text
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("image is not base64", str(error)) from None


class Maker:
    """Rows of a range of items; picklable."""

    def __init__(self, reader: Reader, records: Sequence[Record], items: Sequence[Item], most: int | None) -> None:
        self.reader, self.records, self.items, self.most = reader, records, items, most

    def __call__(self, start: int, stop: int) -> Made:
        made, current = Made([]), -1
        asked, images, failed = Question("", ""), list[dict[str, Any]](), ""
        for item in self.items[start:stop]:
            record = self.records[item.record]
            if item.record != current:
                current, failed = item.record, ""
                cells = self.reader.table.read(record.byte, record.line)
                asked = self.reader.question(cells, f"{self.reader.table.path}:{record.line}")
                try:
                    holder = cells if record.image_of == record.byte else self.reader.table.read(record.image_of)
                    images = self.reader.images(holder) if self.reader.has_image(holder) else []
                except ImageError as error:
                    failed = error.reason
            turned = _rotated(asked, item, images, record.together)
            built, reason = (None, failed) if failed else question_row(item.id, turned, root=self.reader.folder, most=self.most)
            if built is None:
                made.dropped.append((item.id, reason))
                continue
            made.rows.append(built)
            if self.most is not None and len(images) > self.most:
                made.substituted.append((item.id, CUT))
        return made


def _rotated(asked: Question, item: Item, images: Sequence[Mapping[str, Any]], more: Mapping[str, int]) -> Question:
    """The question with its images, its options moved on. more: of its meta."""
    meta = {**asked.meta, **more, **({"group": item.group, "rotation": item.rotation, "rotations": item.of} if item.of else {})}
    options, answer = list(asked.options), asked.answer
    if item.moved:
        answer = LETTERS[(LETTERS.index(str(answer)) - item.moved) % len(options)]
        options = options[item.moved :] + options[: item.moved]
    return Question(asked.question, answer, options, asked.hint, images, asked.open, meta)


def scan(reader: Reader, spec: Mapping[str, Any]) -> tuple[list[Record], Counter[str], Counter[str]]:
    """The records that the spec asks for, what was left out by reason, and how often each open rule reads. Raises UserError."""
    table, split, limit, keep = reader.table, spec.get("split"), spec.get("rows"), bool(spec.get("text_only", False))
    if split is not None:
        table.require(["split"])
    limit = None if spec.get("circular") else limit
    found: list[tuple[int, int, Question, str]] = []
    holders: dict[str, int] = {}
    lines: dict[str, int] = {}
    splits, left_out, rules = Counter[str](), Counter[str](), Counter[str]()
    waiting: set[str] = set()
    for byte, line, cells in table.scan():
        index, where = cells["index"].strip(), f"{table.path}:{line}"
        if not index:
            raise UserError("a row without an index", where=where)
        if index in lines:
            raise UserError(f"index {index} is there twice", why=f"first at line {lines[index]}", where=where)
        lines[index] = line
        image = cells.get("image", "").strip()
        refers = reader.embedded and 0 < len(image) <= REFERENCE
        if not refers:
            holders[index] = byte
        splits[cells.get("split", "")] += 1
        waiting.discard(index)
        if (split is None or cells["split"] == split) and (limit is None or len(found) < limit):
            if not reader.has_image(cells) and not keep:
                left_out["no image"] += 1
                continue
            asked = reader.question({**cells, "index": index}, where)
            found.append((byte, line, asked, image if refers else index))
            if refers and image not in holders:
                waiting.add(image)
            if asked.open:
                rules[asked.open] += 1
        if limit is not None and len(found) >= limit and not waiting:
            break
    if not found:
        has = ", ".join(f"{name!r}: {count}" for name, count in splits.most_common(8))
        if split is not None and not splits[split]:
            raise UserError(f"{table.path} has no split {split!r}", why=f"it has {has or 'no rows'}", hint="split: one of these")
        hint = "text_only: true keeps those without an image"
        raise UserError(f"{table.path} has no question to ask", why=f"left out: {dict(left_out)}", hint=hint)
    records = []
    groups = together([asked.meta for _, _, asked, _ in found])
    for (byte, line, asked, holder), others in zip(found, groups):
        if holder not in holders:
            why = "which has none of its own" if holder in lines else f"no such row; {REFERENCE} characters or fewer are an index"
            raise UserError(f"the image of row {asked.meta['index']} is that of row {holder!r}", why=why, where=f"{table.path}:{line}")
        fixed = not asked.options or _names_letters(asked.options)
        records.append(Record(byte, line, str(asked.meta["index"]), len(asked.options), fixed, holders[holder], others))
    return records, left_out, rules


def arrange(records: Sequence[Record], name: str, circular: bool) -> tuple[list[Item], dict[str, int]]:
    """What is asked of the records, and counts for the manifest: questions (`records`), and what became of rotations."""
    places = {record.index: number for number, record in enumerate(records)}
    high = {record.index: str(int(record.index) % COPY) for record in records if record.index.isdecimal() and int(record.index) >= COPY}
    original = {index: base for index, base in high.items() if base in places}
    alone = high.keys() - original.keys() if original else set[str]()  # copies of a row that isn't asked: in no group, as in VLMEvalKit
    copies: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        if record.index not in alone:
            copies.setdefault(original.get(record.index, record.index), []).append(number)
    lost = {"copies_without_original": len(alone)} if alone else {}
    if not circular:
        items = [Item(places[index], f"{name}-{index}") for index in copies]
        return items, {"records": len(items), **lost, **({"rotated_copies_left_out": len(original)} if original else {})}
    items, fixed = [], 0
    step = COPY
    numbers = [int(index) for index in copies if index.isdecimal()]
    while numbers and max(numbers) >= step:
        step *= 10
    for index, members in copies.items():
        group, record = f"{name}-{index}", records[members[0]]
        if original:
            ordered = sorted(members, key=lambda number: int(records[number].index))
            turns = [(number, f"{name}-{records[number].index}") for number in ordered]
        elif record.fixed:
            fixed += 1
            turns = [(members[0], group)]
        else:
            first = members[0]
            at = int(index) if index.isdecimal() else None
            names = (f"{group}-rotation-{i}" if at is None else f"{name}-{at + step * i}" for i in range(1, record.options))
            turns = [(first, group), *((first, id) for id in names)]
        items += [Item(number, id, i, group, len(turns), 0 if original else i) for i, (number, id) in enumerate(turns)]
    return items, {"records": len(copies), "not_rotated": fixed, **lost}


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    check_keys(spec, ["file", "images", "split", "circular", "most_images", "open", "pair", "text_only", "rows"])
    named = [spec["file"], f"LMUData/{spec['file']}"] if spec.get("file") else []
    file = below({key: value for key, value in spec.items() if key != "file"}, "file", data_root, named)
    folder = below(spec, "images", data_root, folder=True) if spec.get("images") else file.parent
    reader, most, circular = Reader(Table(file), spec, folder), check_most(spec), bool(spec.get("circular", False))
    records, left_out, rules = scan(reader, spec)
    items, counts = arrange(records, file.stem, circular)
    if spec.get("rows") is not None:
        wanted = list(dict.fromkeys(item.group or item.id for item in items))[: spec["rows"]]
        items = [item for item in items if (item.group or item.id) in set(wanted)]
        counts["records"] = len(wanted)
    return write_sharded(
        len(items), Maker(reader, records, items, most), Path(out), SHARD_ROWS, kind="questions", part="questions", root=str(folder),
        circular=circular, filtered=dict(left_out), open=dict(rules), **counts,
    )  # fmt: skip
