"""One optimiser step, for any objective.

    micro-batches ──(pass 1, only if the objective gathers)──► representations of the whole step ──► their cotangents
                  ──(pass 2)──► local loss + Σ representation · cotangent ──backward──► gradients ──► optimiser

Loss and gradient are those of the step's samples taken at once, whatever the micro-batches, packing, accumulation and devices:
local losses are sums over global counts, gathered losses are computed on all samples and their gradient reaches each micro-batch through
its representations (cached gradients: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers import rng
from trainers.batch import TensorBatch
from trainers.engine import Engine
from trainers.objectives.base import Objective


@dataclass(frozen=True)
class StepLoss:
    """This rank's share: summed over the ranks they are the step's losses. float[]"""

    local: Tensor
    gathered: Tensor

    @property
    def total(self) -> Tensor:
        return self.local + self.gathered


def train_step(engine: Engine, objective: Objective, batches: Sequence[TensorBatch], learning_rates: dict[str, float]) -> StepLoss:
    """Gradients of all micro-batches of this rank, then one optimiser step at `learning_rates` (by part)."""
    count = objective.normaliser(batches[0])
    alone = len(batches) == 1 and engine.world == 1
    passed, states = first_pass(engine, batches, with_gradient=alone) if objective.gathers else ([], [])
    loss, cotangents = gather(engine, objective, batches, passed)
    local = torch.zeros((), device=engine.device)
    for number, batch in enumerate(batches):
        if passed and not alone:
            rng.restore(states[number])
        loss_sum, rows = passed[number] if alone and passed else engine.forward(batch)
        pulls = [(rows[name].float() * cotangents[name][batch.samples]).sum() for name in objective.gathers]
        engine.backward(loss_sum / count + sum(pulls), last=number + 1 == len(batches))
        local += loss_sum.detach() / count
    engine.step(learning_rates)
    return StepLoss(local, loss / engine.world)


def first_pass(engine: Engine, batches: Sequence[TensorBatch], with_gradient: bool) -> tuple[list, list]:
    """Every micro-batch's (loss_sum, representations), and the random state each began with. A lone one is kept with its graph."""
    passed, states = [], []
    for batch in batches:
        states.append(rng.capture(engine.device))
        with torch.set_grad_enabled(with_gradient):
            passed.append(engine.forward(batch))
    return passed, states


def gather(engine: Engine, objective: Objective, batches: Sequence[TensorBatch], passed: list) -> tuple[Tensor, dict[str, Tensor]]:
    """The gathered loss float[] of the whole step (the same on every rank), and d loss / d representation, float[B, ...] by name."""
    if not objective.gathers:
        return torch.zeros((), device=engine.device), {}
    whole: dict[str, Tensor] = {}
    for name in objective.gathers:
        rows = [representations[name].detach().float() for _, representations in passed]
        # each sample is on one rank: adding up zeros elsewhere is a gather that needs no counts, and exact
        full = rows[0].new_zeros(batches[0].step_samples, *rows[0].shape[1:])
        for batch, part in zip(batches, rows):
            full[batch.samples] = part
        whole[name] = engine.sum_over_ranks(full).requires_grad_()
    with torch.enable_grad():
        # a step whose rows were all dropped compares nothing
        loss = objective.gathered(whole) if batches[0].step_samples else torch.stack([w.sum() for w in whole.values()]).sum()
        gradients = torch.autograd.grad(loss, list(whole.values()), allow_unused=True)
    return loss.detach(), {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(whole.items(), gradients)}
