"""Released vision-language models, asked as their authors ask them: own processor, own chat template, transformers' `generate`.

In: a predict stage's spec whose ModelSpec is of family `existing` (`trainers.models.existing`). Out: what `trainers.predict` asks of a way
of asking: `load_questions` and an `Answerer`; the artefact is the same.

Batches are padded on the left. Answers don't depend on them: a row whose two best logits lie closer than a multiple of what a batch
changes, wherever a token was chosen, is asked again alone (`trainers.first_token`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList

from datasets_ray.errors import UserError
from datasets_ray.images import FITS, ImageError, ImageLayout, decode
from datasets_ray.questions import Pixels, Prompts
from datasets_ray.rows import RowTable, open_rows
from datasets_ray.tokens import IGNORE, Encoded
from trainers import families, first_token
from trainers.answering import DECODING_THREADS, SMALLEST_BATCH, Answer, Chunked, Questions, decoded_ahead, methods_of
from trainers.context import Context
from trainers.generate import Generated
from trainers.loaded import identity, load_model
from trainers.models.existing import load_processor, weights_of
from trainers.prefixes import cut, image_numbers

METHODS = ("generate", "first_token")
"""Likelihoods are for models that run packed."""
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MARKED = "the question holds the model's own image mark"
Spec = dict[str, Any]


# ── the questions ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_questions(spec: Spec, ctx: Context) -> Questions:
    """The questions as this model's family words them. Lengths are those of the text: what an image takes shows when it is read."""
    for name in methods_of(spec):
        if name not in METHODS:
            why = "a released model is asked through its own processor, which shares no prefixes"
            hint = f"method: {' or '.join(METHODS)}"
            raise UserError(f"method {name!r} of {weights_of(spec['model'])['checkpoint']}", why=why, hint=hint)
    rows = open_rows(str(ctx.inputs(spec["questions"])))
    if not len(rows):
        raise UserError("a question set without questions", why="n = 0 is no score", hint="look at the dataset stage's dropped rows")
    key = f"asked:{identity([spec['questions'], spec['model']])}"
    prompts = ctx.cache.get(key, lambda: prepare(rows, spec["model"], _processor(spec, ctx)), lambda made: made.nbytes)
    return Questions(rows, prompts, Pixels(rows, None), image_numbers(rows))


def _processor(spec: Spec, ctx: Context) -> Any:
    return ctx.cache.get(f"processor:{identity(spec['model'])}", lambda: load_processor(spec["model"]), lambda _: 1 << 24)


def prepare(rows: RowTable, model: Spec, processor: Any) -> Prompts:
    """Every question as the text that the processor gets, images marked in it."""
    rule, mark = model["prompts"], getattr(processor, "image_token", None)
    made = Prompts([None] * len(rows), [None] * len(rows), [[] for _ in range(len(rows))])
    asked: list[int] = []
    for index, row in enumerate(rows.table.select(["question", "hint", "options", "meta"]).to_pylist()):
        images = len(rows.table.column("images")[index])
        content = families.content(rule, families.words(rule, row), images)
        if mark and any(mark in part for part in content if part is not None):
            made.dropped[MARKED] += 1
            continue
        made.layouts[index] = [ImageLayout(0, 0, 0)] * content.count(None)
        made.prompts[index] = conversation(processor, rule, content) + rule["begin"].get(families.kind_of(row), "")
        asked.append(index)
    if asked:
        tokens = processor.tokenizer([made.prompts[index] for index in asked], add_special_tokens=False)["input_ids"]
        for index, ids in zip(asked, tokens):
            known = np.asarray(ids, dtype=np.int64)
            made.encoded[index] = Encoded(known, np.full(len(known), IGNORE, dtype=np.int64), np.zeros(0, dtype=np.int64), False)
    return made


def conversation(processor: Any, rule: families.Rule, content: Sequence[str | None]) -> str:
    """One user's turn up to where the answer begins: the family's own conversation, or the processor's chat template."""
    if not rule["chat"]:
        parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]
        return processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
    mark = getattr(processor, "image_token", "")
    numbers = iter(range(1, len(content) + 1))
    written = [families.fill(rule["image"], mark=mark, n=str(next(numbers))) if part is None else part for part in content]
    front = next((at for at, part in enumerate(content) if part is not None), len(content))
    return families.fill(rule["chat"], images="".join(written[:front]), words="".join(written[front:]))


# ── the answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Watch(LogitsProcessor):
    """Changes nothing; keeps how close each choice was, and all logits of the rows that are watched."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.gaps: list[list[float]] = []
        self.logits: dict[int, list[torch.Tensor]] = {row: [] for row in rows}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        two = scores.topk(2, -1).values.float()
        self.gaps.append((two[:, 0] - two[:, 1]).tolist())
        for row, kept in self.logits.items():
            kept.append(scores[row].float().cpu())
        return scores


class Answerer(Chunked):
    """Answers chunks of a set's rows, greedily. chunks: all that will be asked for, in this order, so that images are decoded ahead."""

    def __init__(self, spec: Spec, ctx: Context, questions: Questions, chunks: Sequence[np.ndarray]) -> None:
        self.spec, self.questions, self.rule, self.device = spec, questions, spec["model"]["prompts"], ctx.device
        size = int(ctx.runtime.get("eval_batch", SMALLEST_BATCH))
        self.size = min(size, self.rule["batch"] or size)
        self.processor = _processor(spec, ctx)
        self._pad = _mean_colour(self.processor) if self.rule["square"] == "pad" else None
        pool = ThreadPoolExecutor(DECODING_THREADS)
        batches = [batch for chunk in chunks for batch in self._batches(chunk)]
        self._ahead = decoded_ahead(batches, pool, self._shown)
        self.model = load_model(spec["model"], None, spec["precision"], ctx).parts["model"].to(TYPES[spec["precision"]])
        self.ends = self._settle(int(spec["max_new_tokens"]))
        self.options = questions.rows.column("options")
        takes = inspect.signature(self.model.forward).parameters
        self._unwanted = [name for name in ("token_type_ids",) if name not in takes]
        self.threshold: first_token.Threshold | None = None

    def _settle(self, limit: int) -> set[int]:
        """Greedy generation whatever the checkpoint's own settings say (sampling, penalties); returns the end tokens."""
        from transformers import GenerationConfig

        own, tokenizer = self.model.generation_config, self.processor.tokenizer
        given = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
        ends = {given} if isinstance(given, int) else set(given or ())
        self.model.generation_config = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=limit, eos_token_id=sorted(ends) or None, bos_token_id=own.bos_token_id,
            pad_token_id=tokenizer.pad_token_id, use_cache=True,
        )  # fmt: skip
        return ends

    def _batches(self, chunk: np.ndarray) -> list[list[int]]:
        """Rows with as many images as each other: processors line images up by row."""
        counts = [len(self.questions.prompts.layouts[row]) for row in chunk]
        alike = [chunk[[at for at, count in enumerate(counts) if count == wanted]] for wanted in sorted(set(counts))]
        return [piece.tolist() for rows in alike for piece in cut(rows, self.size, self.questions.images)]

    def _shown(self, row: int) -> list[Image.Image] | ImageError:
        """A row's images as the processor gets them, or why there are none."""
        rows = self.questions.rows
        images = rows.table.column("images")[row].as_py()[: len(self.questions.prompts.layouts[row])]
        try:
            made = [decode(image, rows.root) for image in images]
        except ImageError as error:
            return error
        return made if self._pad is None else [FITS["pad"](image, max(image.size), self._pad) for image in made]

    def _answered(self, rows: list[int], images: list[list[Image.Image]]) -> dict[int, Answer]:
        watch = first_token.spread(len(rows)) if self.threshold is None else []
        made, read = self._generated(rows, images, watch)
        if self.threshold is None:
            alone = {at: self._generated([rows[at]], [images[at]], [0])[0][0] for at in watch}
            pairs = [pair for at, one in alone.items() for pair in first_token.compared(made[at].logits, one.logits)]
            self.threshold = first_token.measured(pairs, self.model.dtype)
        answers = {}
        for at, row in enumerate(rows):
            one, close = made[at], len(rows) > 1 and not made[at].gap > self.threshold.value
            if close:
                one = self._generated([row], [images[at]])[0][0]
            text = str(self.processor.tokenizer.decode(one.tokens, skip_special_tokens=True)).strip()
            answers[row] = Answer(
                text=text, finished=one.finished, new_tokens=len(one.tokens), alone=close, read_tokens=read[at],
                read_images=len(images[at]), threshold=self.threshold.value,
                shortcut=first_token.letter_of(text, len(one.tokens), one.finished, self.options[row]) is not None,
            )  # fmt: skip
        return answers

    @torch.no_grad()
    def _generated(
        self, rows: Sequence[int], images: Sequence[Sequence[Image.Image]], watch: Sequence[int] = ()
    ) -> tuple[list[Generated], list[int]]:
        """(each row's greedy answer, tokens that its prompt took with its images)."""
        watched, inputs = Watch(watch), self._inputs([str(self.questions.prompts.prompts[row]) for row in rows], images)
        made = self.model.generate(**inputs, logits_processor=LogitsProcessorList([watched]))
        answers = []
        for at, ids in enumerate(made[:, inputs["input_ids"].shape[1] :].tolist()):
            end = next((k for k, token in enumerate(ids) if token in self.ends), None)
            tokens = ids[:end]
            chosen = len(tokens) + (end is not None)
            gap = min((step[at] for step in watched.gaps[:chosen]), default=math.inf)
            answers.append(Generated(tokens, end is not None, gap, watched.logits.get(at, [])[:chosen]))
        return answers, inputs["attention_mask"].sum(1).tolist()

    def _inputs(self, texts: list[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        flat = [image for shown in images for image in shown]
        begin = self.processor.tokenizer.bos_token
        more: dict[str, Any] = {"images_kwargs": self.rule["images_kwargs"]} if self.rule["images_kwargs"] and flat else {}
        if begin and texts[0].startswith(begin):
            more["add_special_tokens"] = False  # a chat template has written it already
        try:
            made = self.processor(text=texts, images=flat or None, padding=True, return_tensors="pt", **more)
        except (ValueError, TypeError) as error:
            what = f"the processor of {weights_of(self.spec['model'])['checkpoint']} can't take these questions"
            hint = f"is {self.rule['name']!r} the family of this checkpoint?"
            raise UserError(what, why=str(error).strip().splitlines()[0], hint=hint) from error
        made = made.to(self.device, dtype=self.model.dtype)
        return {name: value for name, value in made.items() if name not in self._unwanted}


def _mean_colour(processor: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in processor.image_processor.image_mean)
