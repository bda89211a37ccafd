"""A training stage's numbers, read one step late so that a GPU never waits for them.

In: each step's losses as tensors, still being computed. Out: one metrics record a step, running totals in a `Progress`, and `Diverged`
where a loss or gradient stopped being a number.
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
from trainers.step import StepLoss


class Diverged(ArithmeticError):
    """The loss or gradient is not a number: the same at every attempt, so a stage that raises it is not retried."""


@dataclass
class _Pending:
    step: int
    numbers: torch.Tensor
    """float[3], being summed over the ranks: local loss, gathered loss, tokens."""
    work: Any
    norm: Any
    gathers: bool
    batch: TensorBatch
    record: dict[str, Any]
    seconds: float
    waited: float


class Meter:
    def __init__(self, ctx: Context, progress: Progress, steps: int) -> None:
        self.ctx, self.progress, self.steps = ctx, progress, steps
        self.pending: _Pending | None = None
        self.began = time.perf_counter()

    def begin(self) -> None:
        """The clock of the first step starts."""
        self.began = time.perf_counter()

    def push(
        self, engine: Engine, share: StepLoss, gathers: bool, batches: list[TensorBatch], rates: dict[str, float], waited: float
    ) -> None:
        """Takes over a finished step (the progress already counts it); reads the one before."""
        tokens = torch.tensor(float(sum(b.tokens for b in batches)), device=engine.device)
        numbers = torch.stack([share.local.float(), share.gathered.float(), tokens])
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
        local, gathered, tokens = it.numbers.tolist()
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
            "data/wait_share": min(1.0, it.waited / max(it.seconds, 1e-9)),
        }  # fmt: skip
        self.ctx.report(record)
        self.progress.losses.append(loss)
        self.progress.tokens += int(tokens)
        self.progress.valid_tokens += it.batch.valid_tokens
        self.progress.samples += it.batch.step_samples
