"""Answering: a model and batches of questions in, an `Answer` a question out, by every method asked for in one pass.

    batch ──tree of shared prefixes, read once──► state ──► options' likelihoods, on branches of it
                                                      └───► greedy answers
    rows with a close call ──► the same once more, each alone

The next batch's images are decoded meanwhile: by Ray Data where a set is large, else by threads of this process.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from datasets_ray import streaming
from datasets_ray.answers import LETTERS
from datasets_ray.encoding import Stats
from datasets_ray.images import ImageError, ImageRecipe
from datasets_ray.packing import Pack
from datasets_ray.questions import KEPT_BYTES, Pixels, Prompts, question_pack
from datasets_ray.rows import RowTable, open_rows
from datasets_ray.tokens import end_id, load_tokenizer
from trainers import first_token
from trainers.batch import TensorPack
from trainers.context import Context
from trainers.generate import Generated, greedy
from trainers.likelihood import FORMS, Sayings, Scored, continued
from trainers.loaded import load_model
from trainers.prefixes import Images, cut, images_of, key_of, pack_spans, tree

METHODS = ("generate", "first_token", "likelihood")
SMALLEST_BATCH = 64
DECODING_THREADS = min(4, len(os.sched_getaffinity(0)))
STREAMED_ROWS = 2048
"""A set of so many rows whose pixels aren't kept is decoded by Ray Data. It takes 0.4 s to hand on its first batch (two cores, LLaVA's 336
pixels at 2 ms an image), too much beside the seconds of a smaller set."""

Shown = list[np.ndarray] | ImageError
"""A row's decoded images, or why there are none."""


@dataclass
class Answer:
    """What one question was answered, and what that took. Fields are columns of a part file, so they are plain."""

    text: str | None = None
    """The greedy answer; None where none was asked for."""
    finished: bool = False
    new_tokens: int = 0
    shortcut: bool = False
    """The first token is an option's letter and the second ends the answer."""
    alone: bool = False
    """Answered again by itself, for a close call in its batch."""
    letter_sums: list[float] | None = None
    letter_tokens: list[int] | None = None
    text_sums: list[float] | None = None
    text_tokens: list[int] | None = None
    read_tokens: int = 0
    """Prompt tokens that the model read for this row; a shared prefix is counted at one of its rows, in every batch."""
    read_images: int = 0
    threshold: float | None = None
    sum_threshold: float | None = None
    dropped: str | None = None

    def scored(self, form: str, options: Sequence[str]) -> Scored | None:
        """The likelihoods of one form (`letter`, `text`)."""
        sums, tokens = getattr(self, f"{form}_sums"), getattr(self, f"{form}_tokens")
        return None if sums is None else Scored(sums, tokens, said_by(form, options))


PART = pa.schema(
    [
        ("row", pa.int64()), ("text", pa.string()), ("finished", pa.bool_()), ("new_tokens", pa.int64()), ("shortcut", pa.bool_()),
        ("alone", pa.bool_()), ("letter_sums", pa.list_(pa.float64())), ("letter_tokens", pa.list_(pa.int64())),
        ("text_sums", pa.list_(pa.float64())), ("text_tokens", pa.list_(pa.int64())), ("read_tokens", pa.int64()),
        ("read_images", pa.int64()), ("threshold", pa.float64()), ("sum_threshold", pa.float64()), ("dropped", pa.string()),
    ]
)  # fmt: skip


def said_by(form: str, options: Sequence[str]) -> list[str]:
    """What each option says: its letter, or its own words."""
    return list(LETTERS[: len(options)]) if form == "letter" else list(options)


@dataclass(frozen=True)
class Questions:
    """A set as one model sees it."""

    rows: RowTable
    prompts: Prompts
    pixels: Pixels
    images: list[Images]
    """Each row's images by number."""

    @property
    def recipe(self) -> ImageRecipe | None:
        return self.pixels.recipe


@dataclass(frozen=True)
class ShowTask:
    """Row numbers → their images, decoded and fitted: what Ray Data runs."""

    directory: str
    recipe: ImageRecipe | None

    def __call__(self, numbers: np.ndarray) -> tuple[list[Shown], Stats]:
        pixels = Pixels(open_rows(self.directory), self.recipe)
        shown = [show(pixels, row) for row in numbers.tolist()]
        return shown, Stats(rows=len(shown), images=sum(len(images) for images in shown if not isinstance(images, ImageError)))


def show(pixels: Pixels, row: int) -> Shown:
    try:
        return pixels.of(row)
    except ImageError as error:
        return error


class Chunked(ABC):
    """What every way of asking shares: chunks of rows become batches whose images are decoded ahead of their turn."""

    _ahead: Generator[tuple[list[int], list[Any]]]
    """Every batch that will be asked, in order, with its rows' images or why there are none."""

    @abstractmethod
    def _batches(self, chunk: np.ndarray) -> list[list[int]]:
        """The chunk's rows as they are asked together."""

    @abstractmethod
    def _answered(self, rows: list[int], images: list[Any]) -> dict[int, Answer]:
        """Row → its answer, of one batch."""

    def answer(self, chunk: np.ndarray) -> dict[int, Answer]:
        """Row → its answer; one that only says why it is dropped, for a row whose image can't be read."""
        answers: dict[int, Answer] = {}
        for _ in self._batches(chunk):
            batch, images = next(self._ahead)
            shown = [(row, one) for row, one in zip(batch, images) if not isinstance(one, ImageError)]
            answers |= {row: Answer(dropped=one.reason) for row, one in zip(batch, images) if isinstance(one, ImageError)}
            if shown:
                answers |= self._answered([row for row, _ in shown], [one for _, one in shown])
        return answers

    def close(self) -> None:
        self._ahead.close()


class Answerer(Chunked):
    """A model and the chunks of questions that it will be given, in this order. Close it when it isn't asked for all of them."""

    def __init__(self, spec: dict[str, Any], ctx: Context, questions: Questions, chunks: Sequence[np.ndarray]) -> None:
        self.questions, self.device = questions, ctx.device
        methods = methods_of(spec)
        self.generates, self.scores = bool({"generate", "first_token"} & set(methods)), "likelihood" in methods
        self.size = int(ctx.runtime.get("eval_batch", SMALLEST_BATCH))
        self._ahead = self._shown([batch for chunk in chunks for batch in self._batches(chunk)])
        self.model = load_model(spec["model"], spec["image"], spec["precision"], ctx)
        self.tokenizer = load_tokenizer(spec["model"]["tokenizer"])
        self.end = end_id(spec["model"]["template"], self.tokenizer)
        self.limit = int(spec["max_new_tokens"])
        self.options = questions.rows.column("options")
        self.sayings = Sayings(self.tokenizer, spec["model"]["template"])
        self.thresholds: tuple[first_token.Threshold, first_token.Threshold] | None = None
        """Of logits and of options' sums, measured on the first batch."""
        self._texts: dict[tuple[int, ...], str] = {}
        self._root: tuple[bytes, Any] = (b"", None)
        """What all prompts of the last batch began with, and the state after it: mostly the next batch's too."""

    def _batches(self, chunk: np.ndarray) -> list[list[int]]:
        return [piece.tolist() for piece in cut(chunk, self.size, self.questions.images)]

    # ── one batch ────────────────────────────────────────────────────────────────────────────────────────────────────────
    def _answered(self, rows: list[int], images: list[list[np.ndarray]]) -> dict[int, Answer]:
        watch = first_token.spread(len(rows)) if self.thresholds is None else []
        state, read = self._read(rows, images)
        scored = self._scored(state, rows)
        made = greedy(self.model, state, self.end, self.limit, watch) if self.generates else [None] * len(rows)
        del state  # its keys and values would lie beside those of the rows answered alone
        if self.thresholds is None:
            self._measure({at: self._alone(rows[at], images[at], watched=True) for at in watch}, made, scored)
        assert self.thresholds is not None
        logits, sums = (one.value for one in self.thresholds)
        answers = {}
        for at, row in enumerate(rows):
            generated, options = made[at], scored[at]
            close = (generated is not None and not generated.gap > logits) or any(form.close(sums) for form in options)
            if close:
                generated, options = self._alone(row, images[at])
            answers[row] = self._answer(row, generated, options, close, read[at])
        return answers

    def _read(self, rows: list[int], images: list[list[np.ndarray]]) -> tuple[Any, list[tuple[int, int]]]:
        """(state of all prompts, (tokens, images) that were read for each row)."""
        prompts = self.questions.prompts
        keys = [key_of(prompts, row, self.questions.images[row]) for row in rows]
        state, read = None, np.zeros((len(rows), 2), dtype=np.int64)
        for spans in (levels := tree(keys)):
            for span in spans:
                read[span.row] += (span.end - span.start, len(images_of(span, prompts, rows[span.row])))
            begin = keys[spans[0].row][: spans[0].end].tobytes() if state is None and len(spans) == 1 < len(levels) else b""
            if begin and begin == self._root[0]:
                state = self._root[1]
                continue
            pack = self._tensors(pack_spans(spans, prompts, rows, images, self.questions.recipe))
            if state is None:
                state = self.model.start(pack)
                self._root = (begin, state) if begin else self._root
            else:
                state = self.model.extend(state, torch.tensor([span.parent for span in spans], device=self.device), pack)
        return state, [(int(tokens), int(shown)) for tokens, shown in read]

    def _alone(self, row: int, images: list[np.ndarray], watched: bool = False) -> tuple[Generated | None, list[Scored]]:
        """A row answered by itself: its prompt whole, nobody beside it."""
        pack = question_pack(self.questions.prompts, [images], [row], self.questions.recipe)
        state = self.model.start(self._tensors(pack))
        (scored,) = self._scored(state, [row])
        return (greedy(self.model, state, self.end, self.limit, [0] if watched else [])[0] if self.generates else None), scored

    def _tensors(self, pack: Pack) -> TensorPack:
        """On the device, without what only training asks for: labels and what is learned of them."""
        ids, positions, slots = (torch.from_numpy(one).to(self.device) for one in (pack.ids, pack.positions, pack.image_slots))
        images: Any = None
        if len(pack.images):
            images = [torch.from_numpy(one) for one in pack.images] if isinstance(pack.images, list) else torch.from_numpy(pack.images)
            images = [one.to(self.device) for one in images] if isinstance(images, list) else images.to(self.device)
        return TensorPack(
            segments=len(pack.lengths), sample=torch.from_numpy(pack.sample), lengths=torch.from_numpy(pack.lengths), ids=ids,
            positions=positions, image_slots=slots, images=images, grids=torch.from_numpy(pack.grids) if len(pack.images) else None,
        )  # fmt: skip

    def _scored(self, state: Any, rows: list[int]) -> list[list[Scored]]:
        """Each row's options in both forms; nothing where likelihoods aren't asked for."""
        if not self.scores:
            return [[] for _ in rows]
        words = [[said_by(form, self.options[row]) for form in FORMS] for row in rows]
        said = [self.sayings.of([text for form in row for text in form]) for row in words]
        made = []
        for forms, ids, sums in zip(words, said, continued(self.model, state, said)):
            parts, start = [], 0
            for form in forms:
                part = slice(start, start + len(form))
                parts.append(Scored(sums[part], [len(one) for one in ids[part]], form))
                start += len(form)
            made.append(parts)
        return made

    def _measure(self, alone: dict[int, Any], made: Sequence[Generated | None], scored: list[list[Scored]]) -> None:
        dtype = self.model.lm_head.weight.dtype
        logits, sums = [], []
        for at, (generated, options) in alone.items():
            batched = made[at]
            if batched is not None:
                logits += first_token.compared(batched.logits, generated.logits)
            sums += [(torch.tensor(a.sums), torch.tensor(b.sums)) for a, b in zip(scored[at], options) if a.sums]
        self.thresholds = first_token.measured(logits, dtype), first_token.measured(sums, dtype)

    def _answer(self, row: int, generated: Generated | None, options: list[Scored], alone: bool, read: tuple[int, int]) -> Answer:
        assert self.thresholds is not None
        made = Answer(alone=alone, read_tokens=read[0], read_images=read[1])
        if generated is not None:
            made.text, made.finished, made.new_tokens = self._text(generated.tokens), generated.finished, len(generated.tokens)
            made.shortcut = first_token.letter_of(made.text, made.new_tokens, made.finished, self.options[row]) is not None
            made.threshold = self.thresholds[0].value
        for form, one in zip(FORMS, options):
            setattr(made, f"{form}_sums", one.sums)
            setattr(made, f"{form}_tokens", one.tokens)
            made.sum_threshold = self.thresholds[1].value
        return made

    def _text(self, ids: list[int]) -> str:
        """Answers are mostly the same few letters: each is decoded once. White space around them is the template's, as in LLaVA."""
        tokens = tuple(ids)
        if tokens not in self._texts:
            self._texts[tokens] = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return self._texts[tokens]

    # ── images, one batch ahead ──────────────────────────────────────────────────────────────────────────────────────────
    def _shown(self, batches: list[list[int]]) -> Generator[tuple[list[int], list[Shown]]]:
        """Each batch with its rows' images; work on the first one begins now."""
        pixels = self.questions.pixels
        if len(self.questions.rows) >= STREAMED_ROWS and pixels.most_bytes >= KEPT_BYTES and streaming._ray_runs():
            task = ShowTask(str(self.questions.rows.directory), pixels.recipe)
            return _streamed(batches, streaming.Stream(task, [np.array(batch) for batch in batches], name="questions"))
        pool = ThreadPoolExecutor(DECODING_THREADS)
        return decoded_ahead(batches, pool, lambda row: show(pixels, row))


def _streamed(batches: list[list[int]], stream: streaming.Stream[list[Shown]]) -> Generator[tuple[list[int], list[Shown]]]:
    with stream:
        yield from zip(batches, stream)


def decoded_ahead(batches: list[list[int]], pool: ThreadPoolExecutor, show: Callable[[int], Any]) -> Generator[tuple[list[int], list[Any]]]:
    """Each batch with what `show` makes of its rows; the next one's is made meanwhile, by a task a thread: a task a row would wait for the
    interpreter at each."""

    def start(batch: list[int]) -> list[Future[list[Any]]]:
        size = -(-len(batch) // DECODING_THREADS)
        return [pool.submit(lambda rows: [show(row) for row in rows], batch[at : at + size]) for at in range(0, len(batch), size)]

    with pool:
        ahead = start(batches[0]) if batches else []
        for number, batch in enumerate(batches):
            shown = [one for future in ahead for one in future.result()]
            ahead = start(batches[number + 1]) if number + 1 < len(batches) else []
            yield batch, shown


def methods_of(spec: dict[str, Any]) -> list[str]:
    """A predict stage's methods; `method` is one or a list."""
    return [spec["method"]] if isinstance(spec["method"], str) else list(spec["method"])
