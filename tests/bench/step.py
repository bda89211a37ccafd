"""The finetuning step against `transformers.Trainer` + `LlavaForConditionalGeneration`: real tokens/s and peak memory, on equal terms.

Equal are: the rows (LLaVA's mix in small, `rows_of`), the weights (one directory, read by both), fp32 on one thread, the encoder frozen,
AdamW's fused kernel and its settings, no clipping, 16 rows a step. The loss of a batch and the mean loss of the first pass must agree
before anything is timed. Each side is a process of its own; passes over the same rows are taken in turn. Peak memory is the process's
largest resident set less what it held before the model was there: rows, and libraries after they have trained a far smaller model.

The peer gets its best: its own length grouping, applied to 3,200 rows, of whose batches every pass takes an even share from shortest to
longest (grouping only the rows of one pass would mix more lengths); sequential reading of batches laid out before; pixels normalised
before; neither norms nor checks that it could leave out. Its default, random order, is shown too. What its class does by itself stays: all
logits, and the tower's last block, which nobody reads (below 2 % of the FLOPs). Ours packs, moves and trains one random step after the
other, as `trainers.train` does, and computes the gradient's norm. Warm-up: one pass each.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.figure import Figure, in_turn, ratios
from tests.bench.side import Side, forget_peak, peak, resident

BATCH, STEPS, PASSES = 16, 12, 2
POOL, MEGABATCH = 3200, 50
"""Rows that the peer groups by length, and how many batches it sorts together (its default)."""
SIZE, PATCH, SCALE = 32, 4, 9
IMAGE_TOKENS = (SIZE // PATCH) ** 2
"""64 positions: a ninth of LLaVA's 576, as all lengths here."""
RATE = 1e-3
MICRO_TOKENS = 4096
VISION = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIZE, "patch_size": PATCH
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A language model's width, layers and vocabulary, and how many times the peer's speed is the goal."""

    width: int
    layers: int
    vocabulary: int
    goal: float

    @property
    def inner(self) -> int:
        return 3 * self.width

    @property
    def logits_share(self) -> float:
        """Share of the logits in the language model's matrix products, where every position gets its logits."""
        head = self.width * self.vocabulary
        return head / (head + self.layers * (4 * self.width**2 + 3 * self.width * self.inner))


SHAPES = {"logits-heavy": Shape(128, 4, 8192, 2.0), "logits-light": Shape(128, 4, 640, 1.4)}
SMALLER = Shape(16, 1, 64, 0.0)
"""What a side trains first, so that everything is loaded before memory is counted."""


@dataclass(frozen=True)
class Row:
    """ids int64[T] with the image's positions at -200, labels int64[T], -100 where nothing is learned; pixels uint8[H, W, 3] or None."""

    ids: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray | None


def rows_of(vocabulary: int, count: int = POOL) -> list[Row]:
    """LLaVA-1.5's finetuning mix at a ninth of its lengths: 94 % of rows with an image of 64 positions (of 665,298 rows 40,688 have none),
    text of 6 to 200 tokens, log-normal around 28, of which the second half is learned."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        tokens = int(min(200, max(6, rng.lognormal(math.log(28), 0.9))))
        text, shown = rng.integers(6, vocabulary, tokens), rng.random() < 0.94
        ids = np.concatenate([[1], np.full(IMAGE_TOKENS if shown else 0, -200), text])
        labels = np.where(np.arange(len(ids)) < len(ids) - max(3, tokens // 2), -100, ids)
        rows.append(Row(ids, labels, rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) if shown else None))
    return rows


def grouped(rows: list[Row]) -> list[list[int]]:
    """The pass, as the peer's grouping forms batches of all rows: STEPS of them, evenly spread from the shortest to the longest."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = get_length_grouped_indices([len(row.ids) for row in rows], BATCH, generator=torch.Generator().manual_seed(0))
    batches = [order[start : start + BATCH] for start in range(0, POOL, BATCH)]
    whole = POOL // (BATCH * MEGABATCH)  # sorted stretches: a quantile of each in turn
    return [batches[step % whole * MEGABATCH + (2 * step + 1) * MEGABATCH // (2 * STEPS)] for step in range(STEPS)]


def shuffled(batches: list[list[int]]) -> list[list[int]]:
    """The same rows in random batches."""
    order = np.random.default_rng(1).permutation([number for batch in batches for number in batch]).tolist()
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


def write_model(shape: Shape, folder: Path) -> None:
    """A random LLaVA, as transformers saves it."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=4, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_id=5, image_seq_length=IMAGE_TOKENS)
    LlavaForConditionalGeneration(config).save_pretrained(folder)


class Ours:
    """trainers: packs of a step's rows, DeepSpeed behind `Engine`, next-token prediction, `train_step`."""

    def __init__(self, vocabulary: int, folder: str, smaller: str, zero: int) -> None:
        import torch

        from trainers.objectives.next_token import NextToken

        torch.set_num_threads(1)
        self.objective, self.zero, self.rates = NextToken(), zero, {"connector": RATE, "llm": RATE}
        self.read(SMALLER.vocabulary, BATCH)
        self.open(smaller)
        self.train([list(range(BATCH))] * 2)
        self.engine.destroy()
        self.read(vocabulary, POOL)
        forget_peak()
        self.before = resident(), peak()
        self.open(folder)

    def read(self, vocabulary: int, count: int) -> None:
        from datasets_ray.packing import Segment

        grid = np.array([[1, SIZE // PATCH, SIZE // PATCH]])
        self.segments = [
            Segment(r.ids, r.labels, () if r.pixels is None else (r.pixels,), grid[: r.pixels is not None], len(r.ids))
            for r in rows_of(vocabulary, count)
        ]

    def open(self, folder: str) -> None:
        from trainers import models
        from trainers.context import Context
        from trainers.engine import Engine
        from trainers.optim import parameter_groups

        builders = {"encoder": "transformers_vision", "connector": "mlp", "llm": "causal_lm"}
        parts = {name: {"builder": builder, "config": {}, "weights": {"checkpoint": folder}} for name, builder in builders.items()}
        spec = {"family": "vlm", "template": "plain", "parts": parts}
        with tempfile.TemporaryDirectory() as aside:
            self.model: Any = models.build(spec, Context.local(Path(aside), {"id": "bench", "spec": {}}))
        models.train_parts(self.model, {"connector", "llm"})
        self.engine = Engine(self.model, self.objective, parameter_groups(self.model.parts, self.rates, 0.0), {}, zero=self.zero)

    def batches(self, numbers: list[int]) -> list[Any]:
        """One step's micro-batches, as `datasets_ray.pipeline` lays them out."""
        from datasets_ray.packing import Batch, assign, pack
        from trainers.batch import to_device

        rows = [self.segments[number] for number in numbers]
        valid = sum(row.valid for row in rows)
        made = []
        for members in assign([row.cost for row in rows], MICRO_TOKENS, 1)[0]:
            streams = {"text": pack([rows[m] for m in members], members, (SIZE, SIZE))}
            made.append(to_device(Batch(streams, len(rows), valid, {"text": valid}, {"text": sum(rows[m].valid for m in members)})))
        return made

    def loss(self, numbers: list[int]) -> float:
        import torch

        with torch.no_grad():
            batches = self.batches(numbers)
            return sum(float(self.objective.forward(self.model, batch).loss_sum) for batch in batches) / batches[0].valid_tokens

    def train(self, steps: list[list[int]]) -> dict[str, float]:
        from trainers.step import train_step

        begin, losses = time.perf_counter(), []
        for numbers in steps:
            losses.append(float(train_step(self.engine, self.objective, self.batches(numbers), self.rates).total))
        return {"seconds": time.perf_counter() - begin, "loss": sum(losses) / len(losses)}

    def memory(self) -> float:
        return grown(*self.before)


class Peer:
    """transformers: Trainer over LlavaForConditionalGeneration, padded batches in the order they are given."""

    def __init__(self, vocabulary: int, folder: str, smaller: str) -> None:
        import torch

        torch.set_num_threads(1)
        self.read(SMALLER.vocabulary, BATCH)
        self.open(smaller)
        self.train([list(range(BATCH))] * 2)
        self.read(vocabulary, POOL)
        forget_peak()
        self.before = resident(), peak()
        self.open(folder)

    def read(self, vocabulary: int, count: int) -> None:
        import torch

        from datasets_ray.images import CLIP_MEAN, CLIP_STD

        mean, std = (np.array(values, dtype=np.float32) for values in (CLIP_MEAN, CLIP_STD))
        self.rows = [
            {
                "input_ids": torch.from_numpy(np.where(r.ids == -200, 5, r.ids)), "labels": torch.from_numpy(r.labels),
                "pixels": None if r.pixels is None else torch.from_numpy((r.pixels.astype(np.float32) / 255 - mean) / std).permute(2, 0, 1),
            }
            for r in rows_of(vocabulary, count)
        ]  # fmt: skip

    def open(self, folder: str) -> None:
        import torch
        from transformers import LlavaForConditionalGeneration

        self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.model.vision_tower.requires_grad_(False)

    @staticmethod
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        made = {"input_ids": torch.zeros(len(rows), longest, dtype=torch.long), "labels": torch.full((len(rows), longest), -100)}
        made["attention_mask"] = torch.zeros_like(made["input_ids"])
        for at, row in enumerate(rows):
            made["input_ids"][at, : len(row["input_ids"])] = row["input_ids"]
            made["labels"][at, : len(row["labels"])] = row["labels"]
            made["attention_mask"][at, : len(row["input_ids"])] = 1
        shown = [row["pixels"] for row in rows if row["pixels"] is not None]
        return {**made, "pixel_values": torch.stack(shown)} if shown else made

    def loss(self, numbers: list[int]) -> float:
        import torch

        with torch.no_grad():
            return float(self.model(**self.collate([self.rows[number] for number in numbers])).loss)

    def train(self, steps: list[list[int]]) -> dict[str, float]:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        times: dict[str, float] = {}

        class Clock(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                times["begin"] = time.perf_counter()

            def on_train_end(self, *_: Any, **__: Any) -> None:
                times["end"] = time.perf_counter()

        with tempfile.TemporaryDirectory() as aside:
            arguments = TrainingArguments(
                output_dir=aside, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=RATE, lr_scheduler_type="constant",
                optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=0.0, train_sampling_strategy="sequential", save_strategy="no",
                logging_strategy="no", logging_nan_inf_filter=False, report_to=[], use_cpu=True, remove_unused_columns=False,
                dataloader_num_workers=0, disable_tqdm=True,
            )  # fmt: skip
            dataset: Any = [self.rows[number] for batch in steps for number in batch]
            trainer = Trainer(model=self.model, args=arguments, train_dataset=dataset, data_collator=self.collate, callbacks=[Clock()])
            result = trainer.train()
        assert result.global_step == len(steps)
        return {"seconds": times["end"] - times["begin"], "loss": result.training_loss}

    def memory(self) -> float:
        return grown(*self.before)


def grown(held: float, highest: float) -> float:
    """MiB between what was held before the model and the highest since, which must be a new height to be the training's."""
    assert peak() > highest, "the libraries' own peak hides the training's"
    return peak() - held


def compare(name: str, repeats: int) -> list[Figure]:
    shape, rows = SHAPES[name], rows_of(SHAPES[name].vocabulary)
    batches = grouped(rows)
    steps = {"grouped": batches, "random": shuffled(batches)}
    tokens = sum(len(rows[number].ids) for batch in batches for number in batch)
    padded = {k: sum(BATCH * max(len(rows[n].ids) for n in batch) for batch in made) for k, made in steps.items()}
    with tempfile.TemporaryDirectory() as folder:
        peer: dict[str, Any] = {"vocabulary": shape.vocabulary, "folder": f"{folder}/model", "smaller": f"{folder}/smaller"}
        write_model(shape, Path(peer["folder"]))
        write_model(SMALLER, Path(peer["smaller"]))
        sides = {
            "ours": Side("tests.bench.step:Ours", zero=0, **peer), "zero": Side("tests.bench.step:Ours", zero=1, **peer),
            "grouped": Side("tests.bench.step:Peer", **peer), "random": Side("tests.bench.step:Peer", **peer),
        }  # fmt: skip
        order = {"ours": "random", "zero": "random", "grouped": "grouped", "random": "random"}
        try:
            losses = {side: sides[side].ask("loss", batches[0]) for side in ("ours", "grouped")}
            assert abs(losses["ours"] - losses["grouped"]) < 1e-4, losses
            first = {side: sides[side].ask("train", steps[order[side]])["loss"] for side in sides}  # the warm-up
            assert abs(first["ours"] - first["random"]) < 1e-3 and abs(first["zero"] - first["random"]) < 1e-3, first

            def passed(side: str) -> float:
                return sides[side].ask("train", steps[order[side]])["seconds"]

            def rates(times: int, *names: str) -> list[list[float]]:
                """Real tokens a second; a repetition is PASSES passes of each, in turn."""
                taken = [in_turn(PASSES, *[partial(passed, name) for name in names]) for _ in range(times)]
                return [[PASSES * tokens / sum(one[at]) for one in taken] for at in range(len(names))]

            few = min(2, repeats)
            ours, by_length = rates(repeats, "ours", "grouped")
            zero, again, by_chance = rates(few, "zero", "ours", "random")
            memory = {side: sides[side].ask("memory") for side in sides}
        finally:
            for side in sides.values():
                side.close()
    waste = {order: padded[order] / tokens - 1 for order in padded}
    equal = f"losses {losses['ours']:.5f} and {losses['grouped']:.5f}; first pass {first['ours']:.4f} and {first['random']:.4f}"
    peers = f"padding {waste['grouped']:.0%} grouped, {waste['random']:.0%} random"
    about = f"D {shape.width}, V {shape.vocabulary}, logits {shape.logits_share:.0%} of FLOPs"
    return [
        Figure(f"step, {name}: ours", "real tokens/s", ours, note=about),
        Figure(f"step, {name}: Trainer grouped by length", "real tokens/s", by_length, note=peers),
        Figure(f"step, {name}: ours / Trainer grouped by length", "x", ratios(ours, by_length), shape.goal, "higher", equal),
        Figure(f"step, {name}: ours / Trainer in random order", "x", ratios(again, by_chance), note=f"{few} repetitions"),
        Figure(f"step, {name}: ours with ZeRO 1 / without", "x", ratios(zero, again), note=f"{few} repetitions"),
        Figure(
            f"step, {name}: peak memory, ours / Trainer grouped", "x", [memory["ours"] / memory["grouped"]], 0.6,
            note=f"{memory['ours']:.0f} / {memory['grouped']:.0f} MiB over libraries and rows; random order {memory['random']:.0f}",
        ),
    ]  # fmt: skip


def measure(repeats: int) -> list[Figure]:
    return [figure for name in SHAPES for figure in compare(name, repeats)]
