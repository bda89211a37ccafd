"""A training stage's numbers, read one step late so that a GPU never waits for them.

In: each step's losses as tensors, still being computed. Out: one metrics record a step, running totals in a `Progress`, what the steps of
this attempt computed and at which share of the device's rate, and `Diverged` where a loss or gradient stopped being a number.

`train/mfu` is model FLOPs (trainers.flops) over what this device's matrix products reach, measured before the first step;
`train/mfu_datasheet` is over the rate that the profile gives (runtime `device_tflops`). Seconds are from step to step, with everything
that happens between.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainers.batch import TensorBatch
from trainers.checkpoint import Progress
from trainers.context import Context
from trainers.engine import Engine
from trainers.flops import Flops, matmul_rate, share
from trainers.step import StepLoss

TERA = 1e12


class Diverged(ArithmeticError):
    """The loss or gradient is not a number: the same at every attempt, so a stage that raises it is not retried."""


@dataclass
class _Pending:
    step: int
    numbers: torch.Tensor
    """float[3 + parts], being summed over the ranks: local loss, gathered loss, tokens, TFLOPs of each part."""
    work: Any
    norm: Any
    gathers: bool
    batch: TensorBatch
    record: dict[str, Any]
    seconds: float
    waited: float


class Meter:
    def __init__(self, ctx: Context, progress: Progress, steps: int, precision: str = "fp32") -> None:
        self.ctx, self.progress, self.steps = ctx, progress, steps
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.pending: _Pending | None = None
        self.began = time.perf_counter()
        self.flops: Flops | None = None
        self.rates: dict[str, float] = {}
        """FLOP/s of one device: `measured`, and `datasheet` where the profile gives it."""
        self.spent: dict[str, float] = {}
        """TFLOPs of this attempt by part, over all ranks."""
        self.seconds = 0.0

    def watch(self, model: Any) -> None:
        """From now on steps train these parts of the model; the device is measured at its largest map, once a process."""
        self.flops = Flops(model)
        if not self.flops.uncounted:
            rows = self.ctx.runtime.get("micro_tokens", 4096)
            self.rates = {"measured": matmul_rate(self.ctx.device, self.dtype, *self.flops.largest, rows)}
            if self.ctx.runtime.get("device_tflops"):
                self.rates["datasheet"] = TERA * self.ctx.runtime["device_tflops"]

    def begin(self) -> None:
        """The clock of the first step starts."""
        self.began = time.perf_counter()

    def push(
        self, engine: Engine, loss: StepLoss, gathers: bool, batches: list[TensorBatch], rates: dict[str, float], waited: float
    ) -> None:
        """Takes over a finished step (the progress already counts it); reads the one before."""
        spent = self.flops.step(batches) if self.flops else {}
        counts = torch.tensor([float(sum(b.tokens for b in batches)), *(f / TERA for f in spent.values())], device=engine.device)
        numbers = torch.cat([torch.stack([loss.local.float(), loss.gathered.float()]), counts])
        work = dist.all_reduce(numbers, async_op=True) if engine.world > 1 else None
        self.flush()
        now = time.perf_counter()
        record = {f"train/lr/{part}": rate for part, rate in rates.items()}
        step = self.progress.step
        self.pending = _Pending(step, numbers, work, engine.norm, gathers, batches[0], record, now - self.began, waited)
        self.began = now
        if engine.skipped:
            raise Diverged(f"the gradient of step {step} of {self.steps} isn't finite")

    def flush(self) -> None:
        """Reads what is pending, reports it and adds it to the progress."""
        if self.pending is None:
            return
        it, self.pending = self.pending, None
        if it.work is not None:
            it.work.wait()
        local, gathered, tokens, *tflops = it.numbers.tolist()
        loss, norm = local + gathered, None if it.norm is None else float(it.norm)
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
            raise Diverged(f"the loss of step {it.step} of {self.steps} is {loss}, its gradient's norm {norm}")
        record: dict[str, Any] = {"step": it.step, "train/loss": loss, **it.record}
        if it.gathers:
            record |= {"train/loss_local": local, "train/loss_gathered": gathered}
        if norm is not None:
            record["train/grad_norm"] = norm
        record |= {
            "train/tokens_per_second": tokens / max(it.seconds, 1e-9), "train/valid_tokens": it.batch.valid_tokens,
            "data/wait_share": min(1.0, it.waited / max(it.seconds, 1e-9)), **self._shares(sum(tflops), it.seconds),
        }  # fmt: skip
        if self.flops:
            self.spent = {part: self.spent.get(part, 0.0) + more for part, more in zip(self.flops.parts, tflops)}
        self.seconds += it.seconds
        self.ctx.report(record)
        self.progress.losses.append(loss)
        self.progress.tokens += int(tokens)
        self.progress.valid_tokens += it.batch.valid_tokens
        self.progress.samples += it.batch.step_samples

    def _shares(self, tflops: float, seconds: float) -> dict[str, float]:
        """`train/mfu` and `train/mfu_datasheet`, as far as they are known."""
        known = {"train/mfu": self.rates.get("measured"), "train/mfu_datasheet": self.rates.get("datasheet")}
        return {key: found for key, rate in known.items() if (found := share(TERA * tflops, self.ctx.world * seconds, rate)) is not None}

    def compute(self) -> dict[str, Any]:
        """Of this attempt's steps, for the stage's summary: model FLOPs by part, seconds, share of both rates."""
        shares = self._shares(sum(self.spent.values()), self.seconds)
        made: dict[str, Any] = {
            "tflops": {part: round(tflops, 6) for part, tflops in self.spent.items()}, "seconds": self.seconds, "devices": self.ctx.world,
            **{f"{name}_tflops_per_second": rate / TERA for name, rate in self.rates.items()},
            **{key.removeprefix("train/"): value for key, value in shares.items()},
        }  # fmt: skip
        if self.flops and self.flops.uncounted:
            made["uncounted"] = sorted(set(self.flops.uncounted))
        return made
