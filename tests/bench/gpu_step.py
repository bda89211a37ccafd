"""One GPU, 7B shapes, random weights: how much of the device the training step uses. Needs torch and transformers, no Ray, no DeepSpeed.

    python -m tests.bench.gpu_step                                finetuning (language model and connector) and pretraining (connector)
    python -m tests.bench.gpu_step --micro-tokens 4096 --checkpointing
    python -m tests.bench.gpu_step --shape tiny --device cpu      the same on small shapes, to see that it runs

The rows are LLaVA's mix at full length (576 image positions and text), packed to the micro-batch by best fit. Model, objective and step are
the house's, behind an engine of one device: bf16 weights, fp32 masters, moments and accumulated gradients, AdamW's fused kernel.
Model FLOPs count real tokens: trained parts three times their forward pass, frozen ones once, twice where a gradient passes, attention
within each row, logits of learned positions; recomputation and padding count nothing. MFU is their rate over the rate of matrix products
measured here, and over the data sheet's. Steps are timed without synchronising inside.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grid import devices, shapes
from tests.bench.figure import Figure

IMAGE_ID, IGNORE = -200, -100


@dataclass(frozen=True)
class Sizes:
    """A vision tower and a language model as Hugging Face configs, and what a row's text is scaled by."""

    vision: dict[str, Any]
    text: dict[str, Any]
    words: float

    @property
    def image_tokens(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


SIZES = {
    "7b": Sizes(
        {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu",
        },
        {
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 4096,
        },
        1.0,
    ),
    "tiny": Sizes(
        {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu",
        },
        {
            "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 512,
        },
        1 / 36,
    ),
}  # fmt: skip
PARTS = ("encoder", "connector", "llm", "attention", "logits")
STAGES = {"finetune": {"connector", "llm"}, "pretrain": {"connector"}}


class OneDevice:
    """What `trainers.step` asks of an engine: gradients added up in fp32 as they come, AdamW on fp32 masters, weights copied back."""

    world, rank, same_modules = 1, 0, False

    def __init__(self, model: Any, objective: Any, device: str) -> None:
        import torch

        self.model, self.objective, self.device = model, objective, device
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.weights]
        for weight, master in zip(self.weights, self.masters):
            master.grad = torch.zeros_like(master)
            weight.register_post_accumulate_grad_hook(self._adder(master))
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, weight_decay=0.0, fused=True)

    @staticmethod
    def _adder(master: Any) -> Any:
        def add(weight: Any) -> None:
            master.grad.add_(weight.grad)
            weight.grad = None

        return add

    def forward(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        output = self.objective.forward(self.model, batch)
        return output.loss_sum, output.representations

    def backward(self, loss: Any, last: bool) -> None:
        loss.backward()

    def step(self, learning_rates: dict[str, float]) -> None:
        import torch

        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
            torch._foreach_zero_([master.grad for master in self.masters])


def rows_of(sizes: Sizes, stage: str, count: int, seed: int = 0) -> list[Any]:
    """Encoded rows: LLaVA's finetuning mix (94 % with an image; text log-normal around 250 tokens, half of it learned), or captions of 10
    to 30 tokens, all learned."""
    from datasets_ray.packing import Segment

    rng, made, side = np.random.default_rng(seed), [], sizes.vision["image_size"]
    patches = side // sizes.vision["patch_size"]
    grid = np.array([[1, patches, patches]])
    for _ in range(count):
        if stage == "pretrain":
            words, shown, share = int(rng.integers(10, 31)), True, 1.0
        else:
            words, shown, share = int(np.clip(rng.lognormal(math.log(250), 0.9), 50, 1400) * sizes.words) + 4, rng.random() < 0.94, 0.5
        text = rng.integers(3, sizes.text["vocab_size"], words)
        ids = np.concatenate([[1], np.full(sizes.image_tokens * shown, IMAGE_ID), text]).astype(np.int64)
        labels = np.where(np.arange(len(ids)) < len(ids) - int(words * share), IGNORE, ids)
        images = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8),) if shown else ()
        made.append(Segment(ids, labels, images, grid[: len(images)], len(ids)))
    return made


def flops_of(sizes: Sizes, rows: list[Any], trained: set[str]) -> dict[str, float]:
    """Model FLOPs of training once on these rows, by part; `attention` is the language model's."""
    tower, text = shapes.transformers_tower(sizes.vision), shapes.language_model(sizes.text)
    join = shapes.connector(2, tower.width, text.width)
    images, lengths = sum(len(row.images) for row in rows), [len(row.ids) for row in rows]
    times = 3 if "llm" in trained else 2
    maps = 2.0 * text.matmul * sum(lengths)
    return {
        "encoder": tower.forward(sizes.image_tokens, images),
        "connector": 3 * 2.0 * join.matmul * images * sizes.image_tokens,
        "llm": times * maps,
        "attention": times * (sum(text.forward(length) for length in lengths) - maps),
        "logits": times * 2.0 * text.head * sum(row.valid for row in rows),
    }


def steps_of(sizes: Sizes, rows: list[Any], micro_tokens: int, per_step: int, device: str) -> list[tuple[list[Any], list[Any]]]:
    """(micro-batches on the device, their rows) of each step: full packs, `per_step` of them."""
    from datasets_ray.packing import Batch, assign, pack
    from trainers.batch import to_device

    side = sizes.vision["image_size"]
    bins = [b for b in assign([row.cost for row in rows], micro_tokens, 1)[0] if sum(rows[m].cost for m in b) > 0.9 * micro_tokens]
    steps = []
    for start in range(0, len(bins) - per_step + 1, per_step):
        mine = [[rows[m] for m in members] for members in bins[start : start + per_step]]
        together = [row for members in mine for row in members]
        valid, first, batches = sum(row.valid for row in together), 0, []
        for members in mine:
            streams = {"text": pack(members, range(first, first + len(members)), (side, side))}
            most = {"text": sum(row.valid for row in members)}
            batches.append(to_device(Batch(streams, len(together), valid, {"text": valid}, most), device))
            first += len(members)
        steps.append((batches, together))
    return steps


def build(sizes: Sizes, device: str, checkpointing: bool, precision: str) -> Any:
    """The model with random weights, made on the device."""
    import torch

    from trainers import models
    from trainers.context import Context

    def part(builder: str, config: dict[str, Any]) -> dict[str, Any]:
        return {"builder": builder, "config": config, "weights": {"fresh": 0}}

    parts = {"encoder": part("transformers_vision", sizes.vision), "connector": part("mlp", {"depth": 2})}
    parts["llm"] = part("causal_lm", sizes.text)
    stage = {"id": "bench", "spec": {}, "runtime": {"activation_checkpointing": checkpointing}}
    with tempfile.TemporaryDirectory() as aside, torch.device(device):
        return models.build({"family": "vlm", "parts": parts}, Context.local(Path(aside), stage), precision=precision).to(device)


def matmul_rate(device: str, size: int) -> float:
    """FLOP/s of a bf16 (CPU: fp32) product of random square matrices."""
    import torch

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    wait(device)
    begin, times = time.perf_counter(), 20
    for _ in range(times):
        a @ b
    wait(device)
    return times * 2.0 * size**3 / (time.perf_counter() - begin)


def wait(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def train(stage: str, sizes: Sizes, given: argparse.Namespace) -> dict[str, float]:
    """Seconds, real tokens and FLOPs by part of the timed steps, and the peak of the device's memory in GiB."""
    import torch

    from trainers import models
    from trainers.objectives.next_token import NextToken
    from trainers.step import train_step

    cuda = given.device.startswith("cuda")
    model = build(sizes, given.device, given.checkpointing, "bf16" if cuda else "fp32")
    models.train_parts(model, STAGES[stage])
    objective: Any = NextToken()
    engine: Any = OneDevice(model, objective, given.device)
    wanted = (given.steps + given.warmup) * given.per_step
    rows = rows_of(sizes, stage, 4 + 2 * wanted * given.micro_tokens // sizes.image_tokens)
    steps = steps_of(sizes, rows, given.micro_tokens, given.per_step, given.device)[: given.steps + given.warmup]
    assert len(steps) == given.steps + given.warmup, "too few full packs"
    for batches, _ in steps[: given.warmup]:
        train_step(engine, objective, batches, {})
    wait(given.device)
    begin = time.perf_counter()
    losses = [train_step(engine, objective, batches, {}).total for batches, _ in steps[given.warmup :]]
    wait(given.device)
    seconds = time.perf_counter() - begin
    assert all(math.isfinite(float(loss)) for loss in losses), "the loss isn't a number"
    together = [row for _, rows in steps[given.warmup :] for row in rows]
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return {
        "seconds": seconds,
        "tokens": float(sum(len(r.ids) for r in together)),
        "peak": peak,
        **flops_of(sizes, together, STAGES[stage]),
    }


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu_step", description="How much of a GPU the training step uses.")
    parser.add_argument("--stage", choices=[*STAGES, "both"], default="both")
    parser.add_argument("--shape", choices=list(SIZES), default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--micro-tokens", type=int, default=2048, help="tokens of a pack")
    parser.add_argument("--per-step", type=int, default=16, help="packs of an optimiser step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    return parser.parse_args(arguments)


def measure(repeats: int) -> list[Figure]:
    """For `make bench`: MFU of both stages over the data sheet's rate, or why there is none."""
    import torch

    given, name = options([]), torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    sheet, figures = devices.specs(name), []
    for stage in STAGES:
        values, why = [], "no GPU here: make bench-gpu measures it" if not name else f"no data sheet of {name}"
        if sheet is not None:
            made = train(stage, SIZES[given.shape], given)
            total = sum(made[part] for part in PARTS)
            values, why = [total / made["seconds"] / (sheet.bf16 * 1e12)], f"{name}; peak {made['peak']:.1f} GiB"
        figures.append(Figure(f"7B shapes, {stage}: MFU over the data sheet", "", values, 0.6, "higher", why))
    return figures


def main(arguments: list[str] | None = None) -> int:
    import torch
    import transformers

    given = options(arguments)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU here: this measures one. On small shapes: --shape tiny --device cpu", file=sys.stderr)
        return 1
    cuda = given.device.startswith("cuda")
    name = torch.cuda.get_device_name() if cuda else "one CPU core"
    if not cuda:
        torch.set_num_threads(1)
    sheet = devices.specs(name)
    rate = matmul_rate(given.device, 8192 if cuda else 512)
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, matrix products {rate / 1e12:.3g} TFLOP/s")
    for stage in STAGES if given.stage == "both" else [given.stage]:
        made = train(stage, SIZES[given.shape], given)
        parts = {part: made[part] for part in PARTS}
        total, seconds = sum(parts.values()), made["seconds"]
        shares = ", ".join(f"{part} {flops / total:.1%}" for part, flops in parts.items())
        print(f"{stage}: {made['tokens'] / seconds:.0f} real tokens/s, {seconds / given.steps:.3f} s a step of {given.per_step} packs of")
        print(f"  {given.micro_tokens} tokens; {total / seconds / 1e12:.4g} TFLOP/s ({shares}); peak {made['peak']:.1f} GiB")
        known = f"{total / seconds / (sheet.bf16 * 1e12):.1%} of the data sheet's {sheet.bf16:g}" if sheet and cuda else "no data sheet"
        print(f"  MFU {total / seconds / rate:.1%} of the measured matrix rate, {known}; goal 60 %")
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
