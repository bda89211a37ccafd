"""Stage `predict`: a model and a set of questions in, its answers out, every one of them kept. Scoring them is another stage.

In: `{"model": ModelSpec, "questions": id, "image": ImageRecipe | null, "suffix", "method", "max_new_tokens": 8, "precision"}`, and
`"listed": false` where the options are scored but not shown.
`method` is one of these or a list of them, all answered in one pass:

    generate      greedy text                                            columns text, finished
    first_token   the same, and what its first token settles             text, finished, first_token_letter (null where it didn't)
    likelihood    log-probabilities of the options (`trainers.likelihood`): likelihood_valid, and for each of letter_raw,
                  letter_per_token, letter_per_byte, text_raw ...: likelihood_text_raw (a number an option), likelihood_text_raw_letter

Out: `predictions.parquet` (id, prompt, options, answer, label, meta and those; in the questions' order) and `manifest.json` (counts, the
threshold below which a row is answered alone, and what was dropped and why).

Prompts depend on rows, tokenizer and template only, pixels on rows and recipe, the loaded model on its weights: each stays in
`ctx.cache`, so that seven benchmarks load an arm once and 24 arms decode an image once. Questions are sorted by length, those about one
image together, and cut into chunks, a function of the set alone; ranks take chunks in turn. Finished chunks go to `ctx.work`; an
interrupted stage goes on from them.
"""

from __future__ import annotations

import importlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from datasets_ray.errors import UserError, nearest
from datasets_ray.images import recipe_from_json
from datasets_ray.questions import Pixels, Prompts, prepare
from datasets_ray.rows import open_rows
from trainers import switches
from trainers.answering import METHODS, PART, Answer, Answerer, Questions, methods_of  # noqa: F401  (Answerer: `way.Answerer`)
from trainers.context import Context, Interrupted
from trainers.likelihood import FORMS, NORMS
from trainers.loaded import identity
from trainers.prefixes import Images, arrange, cut, image_numbers

FLUSH_SECONDS = 10.0
"""Finished chunks are written to disk this often: what a killed stage loses at most, beyond a chunk."""
DROPPED_SHARE = 0.01
"""More questions than this that can't be asked are an error: the number would be another benchmark's."""
SMALLEST_CHUNK, LARGEST_CHUNK, CHUNKS = 64, 1024, 16
ASKED_BY = {"existing": "trainers.existing"}
"""Model family → the module with its own `load_questions` and `Answerer`. All others are asked packed, by this one's."""


def load_questions(spec: dict[str, Any], ctx: Context) -> Questions:
    """The questions as this model's tokenizer and image recipe see them."""
    model, image = spec["model"], spec["image"]
    rows = open_rows(str(ctx.inputs(spec["questions"])))
    if not len(rows):
        raise UserError("a question set without questions", why="n = 0 is no score", hint="look at the dataset stage's dropped rows")
    recipe = None if image is None else recipe_from_json(image)
    tokenizer, template, suffix = model["tokenizer"], model["template"], spec["suffix"]
    listed = bool(spec.get("listed", True))
    prompts = ctx.cache.get(
        f"prompts:{identity([spec['questions'], tokenizer, template, image, suffix, listed])}",
        lambda: prepare(rows, tokenizer, template, recipe, suffix, listed, masks=not switches.on("offsets")),
        lambda made: made.nbytes,
    )
    pixels = ctx.cache.get(f"pixels:{identity([spec['questions'], image])}", lambda: Pixels(rows, recipe), lambda made: made.most_bytes)
    images = ctx.cache.get(f"images:{identity(spec['questions'])}", lambda: image_numbers(rows), lambda made: 100 * len(made))
    return Questions(rows, prompts, pixels, images)


def chunks_of(prompts: Prompts, images: Sequence[Images]) -> list[np.ndarray]:
    """Rows that can be asked, in pieces of about equal size: a function of the set, never of devices or batch size."""
    order = arrange(prompts.lengths, images)
    size = int(np.clip(-(-len(order) // CHUNKS), SMALLEST_CHUNK, LARGEST_CHUNK))
    return cut(order, size, images)


class Parts:
    """Answers on disk while a stage lasts, by row."""

    def __init__(self, ctx: Context) -> None:
        self.ctx, self.folder = ctx, ctx.work / "answers"
        self.answers: dict[int, Answer] = {}
        self.saved: set[int] = set()
        self.flushed = time.monotonic()

    def load(self) -> None:
        """Takes up what was written, by whichever rank; a torn file (a kill while writing) is removed."""
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                rows = parquet.read_table(path, schema=PART).to_pylist()
            except (OSError, pa.ArrowInvalid):
                path.unlink(missing_ok=True)
                continue
            self.answers |= {row.pop("row"): Answer(**row) for row in rows}
        self.saved = set(self.answers)

    def flush(self, force: bool = False) -> None:
        fresh = [row for row in self.answers if row not in self.saved]
        if not fresh or not (force or time.monotonic() - self.flushed >= FLUSH_SECONDS):
            return
        rows = [{"row": row, **asdict(self.answers[row])} for row in fresh]
        self.ctx.guard()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.ctx.rank}-{min(fresh)}.parquet"
        parquet.write_table(pa.Table.from_pylist(rows, schema=PART), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        self.saved.update(fresh)
        self.flushed = time.monotonic()


def run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    with switches.without(ctx.runtime.get("disable", ())):
        return _run(spec, ctx)


def _run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    methods = methods_of(spec)
    for name in methods:
        if name not in METHODS:
            raise UserError(f"unknown prediction method {name!r}", hint=nearest(name, METHODS))
    if not methods:
        raise UserError("no prediction method", hint=f"method: one or several of {', '.join(METHODS)}")
    way = importlib.import_module(ASKED_BY.get(spec["model"]["family"], __name__))
    with ctx.working():
        questions = way.load_questions(spec, ctx)
    chunks = chunks_of(questions.prompts, questions.images)
    parts = Parts(ctx)
    parts.load()
    _meet(ctx)  # nobody writes a part before everyone has read the same ones
    left = [chunk for chunk in chunks if any(int(row) not in parts.answers for row in chunk)]
    mine = left[ctx.rank :: ctx.world]
    rounds = -(-len(left) // ctx.world)
    with ctx.working():
        answerer = way.Answerer(spec, ctx, questions, mine) if mine else None
        try:
            for number in range(rounds):
                if answerer is not None and number < len(mine):
                    parts.answers |= answerer.answer(mine[number])
                    ctx.report({"step": number + 1, "steps": rounds, "done": len(parts.answers)})
                parts.flush()
                _meet(ctx)
                if ctx.stopping(number + 1) and number + 1 < rounds:
                    parts.flush(force=True)
                    raise Interrupted(f"{ctx.stage.get('name', 'predict')} stopped after {len(parts.answers)} answers")
        finally:
            if answerer is not None:
                answerer.close()
        if ctx.world > 1:
            parts.flush(force=True)
            _meet(ctx)
            if ctx.rank == 0:
                parts.load()
        return merge(spec, ctx, questions, parts.answers) if ctx.rank == 0 else {}


def _meet(ctx: Context) -> None:
    """All ranks are here: parts of the others are on disk, and a request to stop is heard in the same round."""
    if ctx.world > 1:
        import torch.distributed as dist

        dist.barrier()


def merge(spec: dict[str, Any], ctx: Context, questions: Questions, answers: dict[int, Answer]) -> dict[str, Any]:
    """Writes the artefact from all answers and returns its summary. Raises UserError when too many questions could not be asked."""
    rows, prompts = questions.rows, questions.prompts
    dropped = Counter(prompts.dropped)
    dropped.update(answer.dropped for answer in answers.values() if answer.dropped is not None)
    kept = [row for row in sorted(answers) if answers[row].dropped is None]
    missing = sum(dropped.values())
    assert len(kept) + missing == len(rows), "every question is answered or dropped"
    if not kept or missing > DROPPED_SHARE * len(rows):
        raise UserError(
            f"{missing} of {len(rows)} questions can't be asked: {dict(dropped)}",
            why=f"above {DROPPED_SHARE:.0%} it would be another benchmark",
            hint="look at the dataset stage's images",
        )
    made, methods = [answers[row] for row in kept], methods_of(spec)
    table = rows.table.select(["id", "options", "answer", "label", "meta"]).take(pa.array(kept))
    table = table.add_column(1, "prompt", pa.array([prompts.prompts[row] for row in kept], pa.string()))
    options = table.column("options").to_pylist()
    for name, values in columns_of(methods, made, options).items():
        table = table.append_column(name, values)
    parquet.write_table(table, ctx.out / "predictions.parquet")
    summary: dict[str, Any] = {
        "n": len(kept),
        "dropped": dict(dropped),
        "longest_prompt": int(prompts.lengths.max()),
        "prompt_tokens": int(prompts.lengths.sum()),
        "read_tokens": sum(one.read_tokens for one in made),
        "images": sum(len(prompts.layouts[row]) for row in kept),
        "read_images": sum(one.read_images for one in made),
        "alone": sum(one.alone for one in made),
    }
    if set(methods) != {"likelihood"}:
        summary |= {
            "finished": sum(one.finished for one in made) / len(made),
            "new_tokens": sum(one.new_tokens for one in made),
            "shortcut": sum(one.shortcut and not one.alone for one in made),
            "generated_on": sum(not one.shortcut and not one.alone for one in made),
            "threshold": max(one.threshold or 0.0 for one in made),
        }
    if "likelihood" in methods:
        summary |= {"sum_threshold": max(one.sum_threshold or 0.0 for one in made), "without_options": sum(not shown for shown in options)}
    facts = {name: spec[name] for name in ("questions", "suffix", "method", "max_new_tokens", "precision")}
    (ctx.out / "manifest.json").write_text(json.dumps({**summary, **facts}, indent=1, sort_keys=True))
    return summary


def columns_of(methods: Sequence[str], made: Sequence[Answer], options: Sequence[Sequence[str]]) -> dict[str, pa.Array]:
    """What the methods add to the table, a value a question."""
    columns: dict[str, pa.Array] = {}
    if set(methods) != {"likelihood"}:
        columns["text"] = pa.array([one.text for one in made], pa.string())
        columns["finished"] = pa.array([one.finished for one in made], pa.bool_())
    if "first_token" in methods:
        columns["first_token_letter"] = pa.array([one.text if one.shortcut else None for one in made], pa.string())
    if "likelihood" in methods:
        picks: list[Sequence[str | None]] = []
        for form in FORMS:
            scored = [one.scored(form, shown) for one, shown in zip(made, options)]
            for norm in NORMS:
                letters = [None if one is None else one.pick(norm) for one in scored]
                name = f"likelihood_{form}_{norm}"
                columns[name] = pa.array([None if one is None else one.values(norm) for one in scored], pa.list_(pa.float64()))
                columns[f"{name}_letter"] = pa.array(letters, pa.string())
                picks.append(letters)
        columns["likelihood_valid"] = pa.array([all(letters) for letters in zip(*picks)], pa.bool_())
    return columns
