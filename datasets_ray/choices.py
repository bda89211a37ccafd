"""Multiple-choice sets: labelled rows and their hard negatives in, question rows and a manifest out.

Every question keeps its options in the order they are shown, and in `meta` its negatives in ascending difficulty. The order shown is a
function of the seed, the row's id and the option alone, so that a subset or another k asks the shared options in the same order.

    python -m datasets_ray.choices build --similarities DIR --rows DIR --k 5 --seed 0 --out DIR [--write-foci FILE]
    python -m datasets_ray.choices build --annotations FILE.jsonl --root IMAGES --k 5 --out DIR   lines of {"id", "image", "label", "wrong"}
    python -m datasets_ray.choices build --foci FILE.json --root IMAGES --out DIR
    python -m datasets_ray.choices show DIR|FILE.json [--rows 3] [--id ID]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from datasets_ray.answers import LETTERS
from datasets_ray.errors import Parser, UserError, run_command
from datasets_ray.files import json_object
from datasets_ray.foci_files import FociQuestion, read_foci, write_foci
from datasets_ray.negatives import Negatives, check_k, distinct_labels, from_annotations, from_similarities
from datasets_ray.rows import SCHEMA, RowTable, row, write_manifest, write_table

QUESTION = "What type of object is in this photo?"
"""The paper's wording, for every classification set (appendix B)."""
DEFAULT_K = 5
SHARD_ROWS = 8192


def shown_order(seed: int, id: str, options: Sequence[str]) -> list[str]:
    """The options in the order they are shown: sorted by a keyed hash, so uniform over orders, and independent of the other rows."""
    key = f"{seed}\n{id}\n".encode()
    return sorted(options, key=lambda option: hashlib.blake2b(key + option.encode(), digest_size=8).digest())


def question_table(table: pa.Table, options: Sequence[Sequence[str]], seed: int, question: str) -> pa.Table:
    """Question rows from labelled rows and their options (right one first, hardest last); images are not touched."""
    shown = [shown_order(seed, id, names) for id, names in zip(table.column("id").to_pylist(), options)]
    meta = [
        json.dumps({**json.loads(known or "{}"), "negatives": list(names[1:])}, sort_keys=True)
        for known, names in zip(table.column("meta").to_pylist(), options)
    ]
    columns: dict[str, list[Any]] = {
        "messages": [[]] * len(shown),
        "question": [question] * len(shown),
        "options": shown,
        "answer": [LETTERS[order.index(names[0])] for order, names in zip(shown, options)],
        "label": [names[0] for names in options],
        "meta": meta,
    }
    for name, values in columns.items():
        table = table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type))
    return table


def write_questions(
    table: pa.Table, negatives: Negatives, out: Path, *, seed: int, question: str = QUESTION, root: str | None = None, **facts: Any
) -> dict[str, Any]:
    """Writes a rows artefact of questions; the manifest says how they were made. facts: model, template, k and whatever else to show."""
    if not negatives.options:
        raise UserError("no question is left", why=f"dropped: {negatives.dropped}", hint="lower k, or give more annotations")
    asked = question_table(table.take(pa.array(negatives.kept)), negatives.options, seed, question)
    Path(out).mkdir(parents=True, exist_ok=True)
    starts = range(0, asked.num_rows, SHARD_ROWS)
    shards = [write_table(asked.slice(s, SHARD_ROWS), Path(out), f"rows-{i:05d}.arrow") for i, s in enumerate(starts)]
    letters = Counter(asked.column("answer").to_pylist())
    facts.setdefault("classes", sorted(set(asked.column("label").to_pylist())))
    return write_manifest(
        Path(out), shards, kind="questions", seed=seed, question=question, root=root, dropped=negatives.dropped,
        ties_at_the_cut=negatives.ties_at_the_cut, ties_in_order=negatives.ties_in_order,
        duplicate_classes=negatives.duplicate_classes, duplicate_rows=negatives.duplicate_rows,
        right_letters={letter: letters[letter] for letter in sorted(letters)}, **facts,
    )


def read_similarities(directory: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """(float32[N, C], manifest with ids, classes, model, template) of a similarities artefact, memory-mapped."""
    folder = Path(directory)
    if not (folder / "similarities.npy").is_file() or not (folder / "manifest.json").is_file():
        why = "similarities.npy and manifest.json are expected"
        raise UserError(f"{folder} holds no similarities", why=why, hint="python -m trainers.mine writes them")
    return np.load(folder / "similarities.npy", mmap_mode="r"), json_object(folder / "manifest.json", "mine again")


def rows_of(ids: Sequence[str], rows: RowTable, name: Path | str) -> list[int]:
    """Where the images behind similarities are among the rows. Images that couldn't be read have none; a stranger is a UserError."""
    place = {id: index for index, id in enumerate(rows.column("id"))}
    strangers = [id for id in ids if id not in place]
    if strangers:
        raise UserError(f"{name} was not made of {rows.directory}", why=f"it has no row {strangers[0]!r}", hint="mine these rows first")
    return [place[id] for id in ids]


def build_from_similarities(similarities: Path, rows: Path, out: Path, *, k: int, seed: int, question: str = QUESTION) -> dict[str, Any]:
    """The k-way set of a similarities artefact and the rows that it was made of."""
    matrix, made = read_similarities(similarities)
    check_k(k, distinct_labels(made["classes"]), str(similarities))
    table = RowTable(rows)
    known = rows_of(made["ids"], table, similarities)
    labelled = table.table.take(pa.array(known))
    negatives = from_similarities(matrix, made["classes"], labelled.column("label").to_pylist(), k)
    unmined = len(table) - len(known)
    if unmined:
        negatives = replace(negatives, dropped={**negatives.dropped, "no similarities": unmined})
    return write_questions(
        labelled, negatives, out, seed=seed, question=question, root=table.manifest.get("root"), k=k, source="similarities",
        model=made.get("model"), template=made.get("template"), classes=made["classes"],
    )


def _labelled(rows: Sequence[dict[str, Any]]) -> pa.Table:
    seen = Counter(r["id"] for r in rows)
    twice = [id for id, count in seen.items() if count > 1]
    if twice:
        raise UserError(f"{len(twice)} ids occur more than once, first {twice[0]!r}", why="a row is known by its id")
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def _annotation(line: str, number: int) -> tuple[dict[str, Any], Mapping[str, int]]:
    where, shape = f"line {number}", 'write {"id": "x", "image": "x.jpg", "label": "cat", "wrong": ["dog", "fox"]}'
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError("not JSON", why=str(error), hint=shape, where=where) from None
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str) or not isinstance(entry.get("wrong"), list | dict):
        raise UserError("not an annotation", why="a string `label` and a list or object `wrong` are needed", hint=shape, where=where)
    if not isinstance(entry.get("image"), str):
        raise UserError("no image", why="`image` is a path below the root", hint=shape, where=where)
    marked = entry["wrong"] if isinstance(entry["wrong"], dict) else Counter(entry["wrong"])
    return row(str(entry.get("id", entry["image"])), images=[{"path": entry["image"]}], label=entry["label"]), marked


def build_from_annotations(file: Path, out: Path, *, root: str | None, k: int, seed: int, question: str = QUESTION) -> dict[str, Any]:
    """A k-way set whose negatives are the wrong predictions that people marked; too short rows are dropped and counted."""
    pairs = [_annotation(line, number) for number, line in enumerate(Path(file).read_text().splitlines(), 1)]
    if not pairs:
        raise UserError(f"{file} is empty")
    rows, wrong = [r for r, _ in pairs], [marks for _, marks in pairs]
    negatives = from_annotations([r["label"] for r in rows], wrong, k)
    return write_questions(
        _labelled(rows), negatives, out, seed=seed, question=question, root=root, k=k, source="annotations", model=None, template=None
    )


def foci_rows(questions: Sequence[FociQuestion]) -> tuple[pa.Table, Negatives]:
    """Labelled rows (id and path are the file's image) and the negatives that the file gives."""
    rows = [row(q.image, images=[{"path": q.image}], label=q.label) for q in questions]
    return _labelled(rows), Negatives([list(q.options) for q in questions], np.arange(len(questions)))


def build_from_foci(file: Path, out: Path, *, root: str | None, k: int | None, seed: int, question: str = QUESTION) -> dict[str, Any]:
    """A FOCI file as question rows with a seeded order (FOCI's own runs draw it without a seed). k: what the file must hold; None: any."""
    questions = read_foci(file)
    table, negatives = foci_rows(questions)
    ways = sorted({len(q.options) for q in questions})
    if k is not None and ways != [k]:
        raise UserError(f"{file} has questions of {ways} options, not {k}", why="a FOCI file's options are fixed", hint="leave --k out")
    return write_questions(
        table, negatives, out, seed=seed, question=question, root=root, k=ways[0] if len(ways) == 1 else ways, source="foci",
        model=None, template=None,
    )


def to_foci(rows: RowTable) -> list[FociQuestion]:
    """Question rows as FOCI's questions; UserError for a row without kept negatives or image path."""
    questions = []
    for entry in rows:
        meta = json.loads(entry["meta"])
        path = meta.get("image") or next((image["path"] for image in entry["images"] if image["path"]), None) or entry["id"]
        if "negatives" not in meta:
            raise UserError(f"question {entry['id']!r} keeps no negatives", why="FOCI orders them by difficulty", hint="use choices build")
        questions.append(FociQuestion(path, (entry["label"], *meta["negatives"])))
    return questions


def show(source: Path, rows: int, id: str | None) -> None:
    """Prints questions as they are asked, the right letter and the negatives with the hardest last."""
    from datasets_ray.prompts import question_prompt

    if source.is_file():
        table, negatives = foci_rows(read_foci(source))
        entries = question_table(table, negatives.options, 0, QUESTION).to_pylist()
        print(f"{len(entries)} questions of {len({e['label'] for e in entries})} labels (FOCI file, shown with seed 0)")
    else:
        opened = RowTable(source)
        entries = list(opened)
        facts = ("k", "seed", "model", "template", "ties_at_the_cut", "ties_in_order", "duplicate_classes", "dropped", "right_letters")
        print(f"{len(entries)} questions of {len({e['label'] for e in entries})} labels; " + ", ".join(
            f"{name} {opened.manifest[name]}" for name in facts if opened.manifest.get(name) not in (None, {})
        ))
    chosen = [e for e in entries if e["id"] == id] if id is not None else entries[:rows]
    if id is not None and not chosen:
        raise UserError(f"no question {id!r} in {source}", hint=f"the first is {entries[0]['id']!r}" if entries else "it is empty")
    for entry in chosen:
        negatives_shown = ", ".join(json.loads(entry["meta"]).get("negatives", []))
        print(f"\n{entry['id']}\n{question_prompt(entry)}\n-> {entry['answer']} ({entry['label']}); hardest last: {negatives_shown}")


def _build(options: argparse.Namespace) -> None:
    out = Path(options.out)
    common: dict[str, Any] = {"seed": options.seed, "question": options.question, "k": options.k}
    if not options.foci and options.k is None:
        common["k"] = DEFAULT_K
    if options.similarities:
        if not options.rows:
            raise UserError("--similarities without --rows", why="the questions are asked about those rows' images", hint="--rows DIR")
        made = build_from_similarities(Path(options.similarities), Path(options.rows), out, **common)
    elif options.annotations:
        made = build_from_annotations(Path(options.annotations), out, root=options.root, **common)
    else:
        made = build_from_foci(Path(options.foci), out, root=options.root, **common)
    if options.write_foci:
        write_foci(to_foci(RowTable(out)), options.write_foci)
    print(json.dumps({key: made[key] for key in made if key not in ("shards", "classes")}, sort_keys=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m datasets_ray.choices", description="Multiple-choice sets with hard negatives.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="questions from similarities, annotations or a FOCI file")
    source = build.add_mutually_exclusive_group(required=True)
    source.add_argument("--similarities", help="a similarities artefact (python -m trainers.mine writes one)")
    source.add_argument("--annotations", help="JSON lines: id, image, label, wrong (labels, or label -> how often)")
    source.add_argument("--foci", help="a FOCI file")
    build.add_argument("--rows", help="the rows artefact that the similarities were made of")
    build.add_argument("--root", help="folder that image paths are relative to")
    build.add_argument("--k", type=int, default=None, help=f"options a question ({DEFAULT_K}; a FOCI file's own)")
    build.add_argument("--seed", type=int, default=0, help="seed of the order shown (0)")
    build.add_argument("--question", default=QUESTION)
    build.add_argument("--out", required=True, help="directory to write")
    build.add_argument("--write-foci", help="also write the questions as a FOCI file")
    look = commands.add_parser("show", help="print questions")
    look.add_argument("source", help="a questions directory or a FOCI file")
    look.add_argument("--rows", type=int, default=3)
    look.add_argument("--id", default=None)
    options = parser.parse_args(arguments)
    if options.command == "show":
        show(Path(options.source), options.rows, options.id)
    else:
        _build(options)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
