"""Stage `predict`: a model and a set of questions in, its answers out, every one of them kept. Scoring them is another stage.

In: `{"model": ModelSpec, "questions": id, "image": ImageRecipe | null, "suffix", "method": "generate", "max_new_tokens": 8, "precision"}`.
Out: `predictions.parquet` (id, prompt, options, answer, label, text, finished; in the questions' order) and `manifest.json` (counts,
and what was dropped and why).

Prompts depend on rows, tokenizer and template only, pixels on rows and recipe, the loaded model on its weights: each stays in
`ctx.cache`, so that seven benchmarks load an arm once and 24 arms decode an image once. Questions are sorted by length and cut into
chunks, a function of the set alone; ranks take chunks in turn. Finished chunks go to `ctx.work`; an interrupted stage goes on from them.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from datasets_ray.errors import UserError, nearest
from datasets_ray.images import ImageError, recipe_from_json
from datasets_ray.packing import Batch
from datasets_ray.questions import Pixels, Prompts, prepare, question_pack
from datasets_ray.rows import RowTable, open_rows
from datasets_ray.tokens import end_id, load_tokenizer
from trainers.batch import to_device
from trainers.context import Context, Interrupted
from trainers.generate import greedy
from trainers.loaded import identity, load_model

FLUSH_SECONDS = 10.0
"""Finished chunks are written to disk this often: what a killed stage loses at most, beyond a chunk."""
DROPPED_SHARE = 0.01
"""More questions than this that can't be asked are an error: the number would be another benchmark's."""
SMALLEST_CHUNK, LARGEST_CHUNK, CHUNKS = 64, 1024, 16
DECODING_THREADS = 4
PART = pa.schema(
    [("row", pa.int64()), ("text", pa.string()), ("finished", pa.bool_()), ("new_tokens", pa.int64()), ("dropped", pa.string())]
)
METHODS = ("generate",)


def load_questions(spec: dict[str, Any], ctx: Context) -> tuple[RowTable, Prompts, Pixels]:
    """The questions as this model's tokenizer and image recipe see them."""
    model, image = spec["model"], spec["image"]
    rows = open_rows(str(ctx.inputs(spec["questions"])))
    recipe = None if image is None else recipe_from_json(image)
    tokenizer, template, suffix = model["tokenizer"], model["template"], spec["suffix"]
    prompts = ctx.cache.get(
        f"prompts:{identity([spec['questions'], tokenizer, template, image, suffix])}",
        lambda: prepare(rows, tokenizer, template, recipe, suffix),
        lambda made: made.nbytes,
    )
    pixels = ctx.cache.get(f"pixels:{identity([spec['questions'], image])}", lambda: Pixels(rows, recipe), lambda made: made.most_bytes)
    return rows, prompts, pixels


def chunks_of(prompts: Prompts) -> list[np.ndarray]:
    """Rows that can be asked, longest first, in pieces of equal size: a function of the set, never of devices or batch size."""
    lengths = prompts.lengths
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    size = int(np.clip(-(-len(order) // CHUNKS), SMALLEST_CHUNK, LARGEST_CHUNK))
    return [order[start : start + size] for start in range(0, len(order), size)]


class Parts:
    """Answers on disk while a stage lasts: `answers` maps a row to (text, finished, new tokens, reason it was dropped or None)."""

    def __init__(self, ctx: Context) -> None:
        self.ctx, self.folder = ctx, ctx.work / "parts"
        self.answers: dict[int, tuple[str, bool, int, str | None]] = {}
        self.saved: set[int] = set()
        self.flushed = time.monotonic()

    def load(self) -> None:
        """Takes up what was written, by whichever rank; a torn file (a kill while writing) is removed."""
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                columns = parquet.read_table(path, schema=PART).to_pydict()
            except (OSError, pa.ArrowInvalid):
                path.unlink(missing_ok=True)
                continue
            self.answers |= dict(zip(columns["row"], zip(*(columns[name] for name in PART.names[1:]))))
        self.saved = set(self.answers)

    def flush(self, force: bool = False) -> None:
        fresh = [row for row in self.answers if row not in self.saved]
        if not fresh or not (force or time.monotonic() - self.flushed >= FLUSH_SECONDS):
            return
        rows = [dict(zip(PART.names, (row, *self.answers[row]))) for row in fresh]
        self.ctx.guard()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.ctx.rank}-{min(fresh)}.parquet"
        parquet.write_table(pa.Table.from_pylist(rows, schema=PART), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        self.saved.update(fresh)
        self.flushed = time.monotonic()


def run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    if spec["method"] not in METHODS:
        raise UserError(f"unknown prediction method {spec['method']!r}", hint=nearest(spec["method"], METHODS))
    with ctx.working():
        rows, prompts, pixels = load_questions(spec, ctx)
    chunks = chunks_of(prompts)
    parts = Parts(ctx)
    parts.load()
    _meet(ctx)  # nobody writes a part before everyone has read the same ones
    left = [chunk for chunk in chunks if any(int(row) not in parts.answers for row in chunk)]
    mine = left[ctx.rank :: ctx.world]
    rounds = -(-len(left) // ctx.world)
    answerer = Answerer(spec, ctx, prompts, pixels) if mine else None
    with ctx.working():
        for number in range(rounds):
            if answerer is not None and number < len(mine):
                parts.answers |= answerer.answer(mine[number])
                ctx.report({"step": number + 1, "steps": rounds, "done": len(parts.answers)})
            parts.flush()
            _meet(ctx)
            if ctx.stopping(number + 1) and number + 1 < rounds:
                parts.flush(force=True)
                raise Interrupted(f"{ctx.stage.get('name', 'predict')} stopped after {len(parts.answers)} answers")
        if ctx.world > 1:
            parts.flush(force=True)
            _meet(ctx)
            if ctx.rank == 0:
                parts.load()
        return merge(spec, ctx, rows, prompts, parts.answers) if ctx.rank == 0 else {}


def _meet(ctx: Context) -> None:
    """All ranks are here: parts of the others are on disk, and a request to stop is heard in the same round."""
    if ctx.world > 1:
        import torch.distributed as dist

        dist.barrier()


class Answerer:
    """A model that answers chunks of questions, the next batch's images being decoded while this one is generated."""

    def __init__(self, spec: dict[str, Any], ctx: Context, prompts: Prompts, pixels: Pixels) -> None:
        self.prompts, self.pixels, self.device = prompts, pixels, ctx.device
        self.model = load_model(spec["model"], spec["image"], spec["precision"], ctx)
        self.tokenizer = load_tokenizer(spec["model"]["tokenizer"])
        self.end = end_id(spec["model"]["template"], self.tokenizer)
        self.limit = int(spec["max_new_tokens"])
        self.batch = int(ctx.runtime.get("eval_batch", SMALLEST_CHUNK))
        self._texts: dict[tuple[int, ...], str] = {}

    def answer(self, chunk: np.ndarray) -> dict[int, tuple[str, bool, int, str | None]]:
        """row → (text, finished, new tokens, None), or ("", False, 0, reason) for a row whose image can't be read."""
        answers: dict[int, tuple[str, bool, int, str | None]] = {}
        batches = [[int(row) for row in chunk[start : start + self.batch]] for start in range(0, len(chunk), self.batch)]
        for batch, images in self._decoded(batches):
            shown = [(row, image) for row, image in zip(batch, images) if not isinstance(image, ImageError)]
            answers |= {row: ("", False, 0, image.reason) for row, image in zip(batch, images) if isinstance(image, ImageError)}
            if not shown:
                continue
            indices = [row for row, _ in shown]
            pack = question_pack(self.prompts, [image for _, image in shown], indices, self.pixels.recipe)
            tensors = to_device(Batch({"text": pack}, len(indices), 0), self.device).streams["text"]
            for row, made in zip(indices, greedy(self.model, tensors, self.end, self.limit)):
                answers[row] = (self._text(tuple(made.tokens)), made.finished, len(made.tokens), None)
        return answers

    def _text(self, tokens: tuple[int, ...]) -> str:
        """Answers are mostly the same few letters: each is decoded once. White space around them is the template's, as in LLaVA."""
        if tokens not in self._texts:
            self._texts[tokens] = str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
        return self._texts[tokens]

    def _decoded(self, batches: list[list[int]]) -> Iterator[tuple[list[int], list[list[np.ndarray] | ImageError]]]:
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            ahead = [pool.submit(self._image, row) for row in batches[0]] if batches else []
            for number, batch in enumerate(batches):
                images = [future.result() for future in ahead]
                ahead = [pool.submit(self._image, row) for row in batches[number + 1]] if number + 1 < len(batches) else []
                yield batch, images

    def _image(self, row: int) -> list[np.ndarray] | ImageError:
        try:
            return self.pixels.of(row)
        except ImageError as error:
            return error


def merge(spec: dict[str, Any], ctx: Context, rows: RowTable, prompts: Prompts, answers: dict[int, Any]) -> dict[str, Any]:
    """Writes the artefact from all answers and returns its summary. Raises UserError when too many questions could not be asked."""
    dropped = Counter(prompts.dropped)
    dropped.update(reason for *_, reason in answers.values() if reason is not None)
    kept = [row for row in sorted(answers) if answers[row][-1] is None]
    missing = sum(dropped.values())
    assert len(kept) + missing == len(rows), "every question is answered or dropped"
    if not kept or missing > DROPPED_SHARE * len(rows):
        raise UserError(
            f"{missing} of {len(rows)} questions can't be asked: {dict(dropped)}",
            why=f"above {DROPPED_SHARE:.0%} it would be another benchmark", hint="look at the dataset stage's images",
        )
    table = rows.table.take(pa.array(kept)).select(["id", "options", "answer", "label"])
    columns = {"prompt": [prompts.prompts[row] for row in kept], "text": [answers[row][0] for row in kept]}
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.string()))
    table = table.append_column("finished", pa.array([answers[row][1] for row in kept], pa.bool_()))
    table = table.select(["id", "prompt", "options", "answer", "label", "text", "finished"])
    parquet.write_table(table, ctx.out / "predictions.parquet")
    summary = {
        "n": len(kept),
        "dropped": dict(dropped),
        "longest_prompt": int(prompts.lengths.max()),
        "finished": sum(answers[row][1] for row in kept) / len(kept),
        "prompt_tokens": int(prompts.lengths.sum()),
        "new_tokens": sum(answers[row][2] for row in kept),
    }
    facts = {name: spec[name] for name in ("questions", "suffix", "method", "max_new_tokens", "precision")}
    (ctx.out / "manifest.json").write_text(json.dumps({**summary, **facts}, indent=1, sort_keys=True))
    return summary
