"""What the training tests share: a tiny real VLM, synthetic steps of samples, a toy two-stream objective, and runs over them.

    python -m tests.trainers.training_kit JOBS.json RANK WORLD STORE     one rank of a multi-process run (tests start these)
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from datasets_ray.packing import Batch, Segment, assign, pack
from datasets_ray.rows import row, write_rows
from datasets_ray.tokens import IGNORE, IMAGE_ID
from trainers import models, optim, train
from trainers.batch import Filler, TensorBatch, to_device
from trainers.context import Context, Interrupted
from trainers.engine import Engine
from trainers.objectives import load_objective
from trainers.objectives.base import Output, by_sample, last_positions
from trainers.objectives.next_token import NextToken
from trainers.step import train_step

VOCABULARY, SIZE, PATCH = 64, 16, 8
IMAGE_TOKENS = (SIZE // PATCH) ** 2
VISION = {"image_size": SIZE, "patch_size": PATCH, "width": 32, "layers": 2, "head_width": 16}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
CLIP = {
    "embed_dim": 16, "vision_cfg": VISION,
    "text_cfg": {"context_length": 16, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2},
}  # fmt: skip
TWO_STREAMS = {"name": "tests.trainers.training_kit:TwoStreams"}


class TwoStreams(NextToken):
    """The toy of DESIGN section 8, law 2: embeddings of an image-and-prompt stream and of a caption stream, gathered over the step,
    plus next-token prediction of the first; with a learned temperature taken from a model weight, so that it too is gathered."""

    streams = {"text": {"kind": "conversation"}, "caption": {"kind": "caption_prompt", "text": "Describe it in one word."}}
    gathers = ("picture", "caption", "temperature")

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__("text")
        self.streams, self.weight = TwoStreams.streams, weight

    def forward(self, model, batch: TensorBatch) -> Output:
        rows, hidden = {}, {}
        for name in self.streams:
            stream = batch.streams[name]
            hidden[name] = model.hidden(stream)
            rows[name] = by_sample(hidden[name][last_positions(stream)], stream)
        scale = model.parts["connector"][-1].bias[:1].exp().expand(len(rows["text"]))
        loss = self.loss_sum(model, batch.streams["text"], hidden["text"])
        return Output(loss, {"picture": rows["text"], "caption": rows["caption"], "temperature": scale})

    def normaliser(self, batch: TensorBatch) -> float:
        return float(batch.valid_tokens)

    def gathered(self, representations):
        left, right = (F.normalize(representations[name], dim=-1) for name in ("picture", "caption"))
        logits = 5.0 * representations["temperature"][:, None] * (left @ right.T)
        return self.weight * F.cross_entropy(logits, torch.arange(len(left)))


def vlm_spec() -> dict[str, Any]:
    return {
        "family": "vlm", "template": "plain", "tokenizer": "tiny-llama",
        "parts": {
            "encoder": {"builder": "open_clip", "config": CLIP, "weights": {"fresh": 1}},
            "connector": {"builder": "mlp", "config": {"depth": 2}, "weights": {"fresh": 2}},
            "llm": {"builder": "causal_lm", "config": LLAMA, "weights": {"fresh": 3}},
        },
    }  # fmt: skip


def vlm(tmp: Path) -> Any:
    """A fresh tiny VLM; the same weights every time."""
    return models.build(vlm_spec(), Context.local(Path(tmp), {"id": "train-test", "spec": {}}))


def steps_of_samples(steps: int, samples: int, seed: int = 0, text_only: bool = False) -> list[list[dict[str, Segment]]]:
    """Samples with a `text` stream (an image, or none in every third) and a `caption` stream, of random length. Steps hold up to two
    fewer, every seventh a single one, which leaves a second rank with nothing.

    text_only: no image anywhere in odd steps.
    """
    rng = np.random.default_rng(seed)
    made = []
    for step in range(steps):
        rows = []
        for number in range(1 if step % 7 == 6 else samples - step % 3):
            words = rng.integers(3, VOCABULARY, size=rng.integers(3, 9))
            has_image = number % 3 != 2 and not (text_only and step % 2)
            slots = [IMAGE_ID] * (IMAGE_TOKENS if has_image else 0)
            ids = np.array([1, *slots, *words, 2], dtype=np.int64)
            labels = np.where(np.arange(len(ids)) > 1 + len(slots) + len(words) // 3, ids, IGNORE)
            images = (rng.integers(0, 256, size=(SIZE, SIZE, 3), dtype=np.uint8),) if has_image else ()
            grids = np.array([[1, SIZE // PATCH, SIZE // PATCH]] * len(images), dtype=np.int64).reshape(-1, 3)
            caption = np.array([1, *rng.integers(3, VOCABULARY, size=rng.integers(2, 6))], dtype=np.int64)
            nothing, none = np.full(len(caption), IGNORE), np.zeros((0, 3), dtype=np.int64)
            text = Segment(ids, labels, images, grids, len(ids))
            rows.append({"text": text, "caption": Segment(caption, nothing, (), none, len(caption))})
        made.append(rows)
    return made


def micro_batches(rows: list[dict[str, Segment]], streams: Iterable[str], capacity: int, rank: int, world: int) -> list[Batch]:
    """One rank's micro-batches of one step, as `datasets_ray.pipeline` lays them out."""
    costs = [sum(row[name].cost for name in streams) for row in rows]
    valid = {name: sum(row[name].valid for row in rows) for name in streams}
    batches, ranks = [], assign(costs, capacity, world)
    for place, members in enumerate(ranks[rank]):
        packs = {name: pack([rows[i][name] for i in members], members, (SIZE, SIZE)) for name in streams}
        most = {name: max(sum(rows[i][name].valid for i in bins[place]) for bins in ranks) for name in streams}
        batches.append(Batch(packs, len(rows), sum(valid.values()), valid, most))
    return batches


FILLER = Filler(np.zeros((SIZE, SIZE, 3), dtype=np.uint8), True, (1, SIZE // PATCH, SIZE // PATCH))


def run(job: dict[str, Any], tmp: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Trains the tiny VLM. job: objective, zero, capacity (tokens of a micro-batch), steps, samples, rates, and optionally more."""
    objective = load_objective(job["objective"])
    torch.manual_seed(0)
    model = vlm(Path(tmp) / f"rank-{rank}")
    rates = job.get("rates", {"connector": 1e-2, "llm": 3e-3})
    models.train_parts(model, set(rates))
    model.train()
    engine = Engine(
        model, objective, optim.parameter_groups(model.parts, rates, job.get("weight_decay", 0.0)), {}, zero=job.get("zero", 0),
        precision=job.get("precision", "fp32"), clip=job.get("clip"), rank=rank, world=world, more=job.get("deepspeed"),
    )  # fmt: skip
    factor = optim.schedule("cosine", job["steps"], 0.05)
    losses, norms = [], []
    for number, rows in enumerate(steps_of_samples(job["steps"], job["samples"], text_only=job.get("text_only", False))):
        batches = micro_batches(rows, objective.streams, job["capacity"], rank, world)
        tensors = [to_device(b, "cpu", FILLER, engine.same_modules) for b in batches]
        share = train_step(engine, objective, tensors, {part: rate * factor(number) for part, rate in rates.items()})
        losses.append(float(engine.sum_over_ranks(share.total.clone())))
        norms.append(float(engine.norm))
    result = {"losses": losses, "norms": norms}
    engine.destroy()
    return result


WORDS = ["a", "small", "red", "flower", "with", "five", "round", "petals", "and", "long", "green", "leaves", "seen", "from", "above"]


def write_captions(directory: Path, rows: int, seed: int = 0) -> Path:
    """A rows artefact of noise images with random captions, every fourth row a text-only conversation."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(rows):
        text = " ".join(rng.choice(WORDS, size=rng.integers(3, 12)))
        if number % 4 == 3:
            made.append(row(f"row-{number}", messages=[{"role": "user", "text": "Say it."}, {"role": "assistant", "text": text}]))
            continue
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, size=(20, 24, 3), dtype=np.uint8)).save(file, "PNG")
        messages = [{"role": "user", "text": "<image>"}, {"role": "assistant", "text": text}]
        made.append(row(f"row-{number}", images=[{"bytes": file.getvalue()}], messages=messages))
    write_rows(made, directory)
    return directory


def train_spec(**changes: Any) -> dict[str, Any]:
    """A `full` pretraining in miniature: the connector alone for a fifth of the steps, then the language model joins."""
    model = vlm_spec()
    model["parts"]["llm"]["config"] = {**LLAMA, "vocab_size": 1536}
    image = {"kind": "square", "size": SIZE, "patch": PATCH, "fit": "crop", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    return {
        "model": model,
        "data": {"rows": ["dataset-test"], "template": "vicuna_v1", "image": image, "max_tokens": 96, "order": "shuffle"},
        "objective": {"name": "next_token"},
        "phases": [
            {"until": 0.2, "learning_rates": {"connector": 3e-3}},
            {"until": 1.0, "learning_rates": {"connector": 3e-3, "llm": 1e-3}},
        ],
        "batch": 8, "steps": 20, "optimizer": {"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
        "schedule": "cosine", "warmup": 0.1, "clip": None, "precision": "fp32", "seed": 0, **changes,
    }  # fmt: skip


def context(directory: Path, rows: Path, rank: int = 0, world: int = 1, **runtime: Any) -> Context:
    """A stage attempt in `directory`; `work` survives between attempts there."""
    stage = {"id": "train-test", "kind": "train", "name": "test", "spec": {}, "runtime": {"micro_tokens": 128, **runtime}}
    return Context.local(directory, stage, {"dataset-test": rows}, rank=rank, world=world)


def run_stage(job: dict[str, Any], folder: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """A train stage in one go, and again with an interruption after `stop` steps. job: rows, runtime, stop, name."""
    spec, rows = train_spec(steps=10), Path(job["rows"])
    whole = train.run(spec, context(folder / f"{job['name']}-whole", rows, rank, world, **job["runtime"]))
    ctx = context(folder / job["name"], rows, rank, world, **job["runtime"])
    ctx.stopping = lambda done: done == job["stop"]
    with contextlib.suppress(Interrupted):
        train.run(spec, ctx)
    resumed = train.run(spec, context(folder / job["name"], rows, rank, world, **job["runtime"]))
    return {"whole": whole["sha256"], "resumed": resumed["sha256"], "loss": whole["loss"], "notes": resumed["notes"]}


def main() -> None:
    jobs, rank, world, store = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, world), rank=rank, world_size=world)
    results = {}
    for name, job in jobs.items():
        begin = time.perf_counter()
        results[name] = (run_stage if "stop" in job else run)(job, Path(sys.argv[1]).parent, rank, world)
        print(f"{name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    if rank == 0:
        Path(sys.argv[1]).with_suffix(".out.json").write_text(json.dumps(results))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
