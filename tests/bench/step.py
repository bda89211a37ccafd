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

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.figure import Figure, in_turn, ratios
from tests.bench.side import Side, forget_peak, peak, resident
from tests.bench.step_rows import BATCH, PASSES, PATCH, POOL, SHAPES, SIZE, SMALLER, grouped, rows_of, shuffled, write_model

RATE = 1e-3
MICRO_TOKENS = 4096


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
