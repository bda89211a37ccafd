"""DeepSpeed behind six calls: forward, backward, step, fragments, restore, destroy.

In: a model with its parts frozen or not, an objective, AdamW groups. Out: gradients accumulated over as many micro-batches as a step has,
averaged exactly over ranks (ZeRO 0-3), optimiser steps, and the optimiser's state as named fragments that outlive the engine.

What is taken care of here, each found in DeepSpeed 0.19.8's source:
- The set of trained parameters is fixed when an engine is made; unfreezing later is silently ignored. A phase is an engine of its own on
  the same module, and moments, step counts and fp32 masters go over by name (`fragments` → `restore`).
- The accumulation boundary is said for every micro-batch, since their number differs from step to step.
- Ranks are averaged, our losses are sums over global counts: the loss is multiplied by the number of ranks before the backward pass.
- ZeRO-3 keeps the last step's gradient of a parameter that the next step doesn't visit: the buffer is cleared after each step.
- An engine is destroyed a second time when it is garbage-collected, and takes the next engine's links with it: only the first counts.
- The CPU build of shared-memory collectives would be compiled at the first engine; it serves inference only and is turned off.
- At 16 bits gradients would be reduced at 16 bits: reductions are set to fp32, as accumulation is. ZeRO 1 would keep the 16-bit gradients
  beside the fp32 ones to the end of the step: each is added up as it comes and dropped.
- ZeRO 3 replaces `torch.nn.functional.linear` for the rest of the process, whose later stages would compute other bits than a fresh one's:
  it is put back when the engine goes.
- Offloading insists on an AdamW of its own, compiled on first use; torch's fused one runs on the host as well and is what is used.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers import switches
from trainers.batch import TensorBatch
from trainers.objectives.base import Objective

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 200_000_000
"""Most elements that are reduced, or gathered, at once: 0.75 GiB in fp32."""


@lru_cache(maxsize=1)
def load_deepspeed(device: str) -> Any:
    """The deepspeed module, once per process; 0.9 s instead of 3.6 s because its autotuner's MLflow and bitsandbytes stay out."""
    if not device.startswith("cuda"):
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", device.partition(":")[2] or "0")  # a launcher's variable; deepspeed refuses to start without
    hidden = [name for name in ("mlflow", "bitsandbytes") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None makes `import` fail, which deepspeed expects of optional packages
    try:
        import deepspeed
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
    # the table of compiled operators is only asked about this one; making it would run a compiler for each of them
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function if function else (lambda f: f)  # type: ignore[assignment]
    try:  # ZeRO imports Muon, whose decorators load the whole of inductor: 2.5 s for an optimiser that isn't used here
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compiler
    import deepspeed.runtime.bf16_optimizer

    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None  # collects garbage and prints, eight times an engine
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def ensure_process_group(rank: int, world: int, device: str) -> None:
    """DeepSpeed needs a process group; a lane has made one, a lone process gets one that talks to itself."""
    if not dist.is_initialized():
        assert world == 1, "a stage on several ranks runs inside a worker group"
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert (dist.get_rank(), dist.get_world_size()) == (rank, world)


@dataclass
class Fragment:
    """What this rank keeps of one parameter: elements [start, start + numel) of it, flattened, in fp32. numel may be 0."""

    start: int
    master: Tensor
    moments: dict[str, Tensor]
    """exp_avg, exp_avg_sq: float[numel]; empty before the first step."""
    step: float
    """AdamW's count of steps."""

    def clone(self) -> Fragment:
        return Fragment(self.start, self.master.detach().clone(), {k: v.detach().clone() for k, v in self.moments.items()}, self.step)

    def part(self, start: int, numel: int) -> Fragment:
        """Elements [start, start + numel) of the parameter, which this fragment has to cover."""
        first = start - self.start if numel else 0
        assert first >= 0 and first + numel <= len(self.master), f"[{start}, {start + numel}) isn't in a fragment from {self.start}"
        span = slice(first, first + numel)
        return Fragment(start, self.master[span], {kind: moment[span] for kind, moment in self.moments.items()}, self.step)


class Trainee(nn.Module):
    """What the engine runs: the objective's forward pass over the model, so that every submodule is called inside one root module."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: TensorBatch) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.objective.forward(self.model, batch)
        return output.loss_sum, output.representations


def config(
    groups: list[dict[str, Any]], precision: str, zero: int, clip: float | None, more: Mapping[str, Any] | None = None,
    *, offload: bool = False, pinned: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """DeepSpeed's configuration. more: keys laid over it (`runtime: {"deepspeed": {...}}`), one level deep; pinned: offloaded state lies in
    page-locked memory (a GPU's copies need it to run beside the computation)."""
    largest = max(1, sum(p.numel() for g in groups for p in g["params"]))
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": zero,
            # the buffers are allocated whole: no larger than what can ever be in them
            "reduce_bucket_size": min(largest, BUCKET),
            "allgather_bucket_size": min(largest + largest % 2, BUCKET),
            **({"offload_optimizer": {"device": "cpu", "pin_memory": pinned}} if offload else {}),
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": float(clip or 0.0),
        "bf16": {"enabled": precision == "bf16", "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    for key, value in (more or {}).items():
        made[key] = {**made.get(key, {}), **value} if isinstance(value, Mapping) else value
    return made


class Engine:
    """One phase's training engine over a model whose trained parts are already set (`models.train_parts`).

    groups: from `optim.parameter_groups`. optimizer: `{"betas", "eps"}`. zero: 0-3; bf16 without ZeRO has no fp32 accumulation in
    DeepSpeed, so 0 becomes 1 there. offload: masters and moments lie in the host's memory and AdamW runs there; from ZeRO 2 on, so less
    becomes 2. `self.zero` says what runs. Every rank makes it at the same time.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, groups: list[dict[str, Any]], optimizer: Mapping[str, Any],
        *, zero: int = 0, precision: str = "fp32", clip: float | None = None, device: str = "cpu", rank: int = 0, world: int = 1,
        offload: bool = False, more: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        deepspeed = load_deepspeed(device)
        ensure_process_group(rank, world, device)
        self.device, self.rank, self.world = device, rank, world
        self.zero = max(zero, 2 if offload else 1 if precision == "bf16" else 0)
        self.clip = clip
        self.parts = [group["part"] for group in groups]
        self.params = [list(group["params"]) for group in groups]
        ids = {id(p): name for name, p in model.named_parameters()}
        self.names = [[ids[id(p)] for p in params] for params in self.params]
        adamw = torch.optim.AdamW(
            groups, betas=tuple(optimizer.get("betas", (0.9, 0.999))), eps=float(optimizer.get("eps", 1e-8)),
            **({"fused": True} if switches.on("fused") else {"foreach": False}),
        )  # fmt: skip
        settings = config(groups, precision, self.zero, clip, more, offload=offload, pinned=offload and device.startswith("cuda"))
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=Trainee(model, objective), optimizer=adamw, config=settings, dist_init_required=False
        )  # fmt: skip
        # a lone rank has nobody to reduce gradients with, and plain reduction would copy them all
        self.engine.enable_backward_allreduce = world > 1 or self.zero > 0
        self.adamw = adamw
        self.owned = len(self.fragments())
        self.norm: Tensor | float | None = None
        """The step's gradient norm before clipping, over all ranks."""
        self.skipped = False
        """The last step's gradient wasn't finite and nothing was changed."""

    @property
    def same_modules(self) -> bool:
        """Ranks gather weights inside the passes, so all have to run the same modules in every micro-batch (`batch.to_device`)."""
        return self.world > 1 and self.zero == 3

    def forward(self, batch: TensorBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss_sum float[], representations) of a micro-batch; under torch.no_grad() without a graph."""
        return self.engine(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds this rank's share of the step's loss to the gradient. last: nothing follows before `step`."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, learning_rates: Mapping[str, float]) -> None:
        for group, part in zip(self.optimizer.param_groups, self.parts):
            group["lr"] = learning_rates[part]
        if self.zero == 0:
            self._clip_plain()
        before = self.engine.skipped_steps
        self.engine.step()
        self.skipped = self.engine.skipped_steps > before
        if self.zero > 0:
            self.norm = self.engine.get_global_grad_norm()
        if self.zero == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()

    def _clip_plain(self) -> None:
        """The norm that ZeRO computes anyway. A parameter nobody visited has a zero gradient here as everywhere, not none."""
        params = [p for group in self.params for p in group]
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.norm = torch.nn.utils.get_total_norm([p.grad for p in params])

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """In place; the sum on every rank."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    # ── state that outlives the engine ───────────────────────────────────────────────────────────────────────────────────
    def _layout(self):
        """(name, start within the parameter, numel, flat fp32 tensor, offset in it) for what this rank owns of every trained parameter."""
        for number, (names, params) in enumerate(zip(self.names, self.params)):
            for name, param in zip(names, params):
                if self.zero == 0:
                    yield name, 0, param.numel(), param, 0
                elif self.zero == 3:
                    group, offset, whole = self.optimizer.grad_position[param.ds_id]
                    start = whole * self.rank
                    numel = min(whole, max(0, param.ds_numel - start))
                    yield name, start, numel, self.optimizer.fp32_partitioned_groups_flat[group], offset
                elif param._hp_mapping is not None:
                    mine, flat = param._hp_mapping.lp_fragment_address, param._hp_mapping.hp_fragment_address
                    yield name, mine.start, mine.numel, self.adamw.param_groups[number]["params"][0], flat.start

    def fragments(self) -> dict[str, Fragment]:
        """By parameter name, this rank's masters and moments: views, to be cloned by whoever keeps them beyond the next step."""
        made = {}
        for name, start, numel, flat, offset in self._layout():
            state = self.adamw.state.get(flat, {})
            views = {key: state[key].detach().view(-1)[offset : offset + numel] for key in MOMENTS if key in state}
            made[name] = Fragment(start, flat.detach().view(-1)[offset : offset + numel], views, float(state.get("step", 0.0)))
        assert len(made) == getattr(self, "owned", len(made)), "DeepSpeed has dropped its links to fp32 masters"
        return made

    def restore(self, find: Callable[[str, int, int], Fragment | None]) -> None:
        """Sets masters, moments and step counts. find(name, start, numel): what is known of it, None: a parameter that starts afresh.

        Parameters of one AdamW group share a count of steps, so a group is restored whole or not at all.
        """
        counts: dict[int, set[float]] = {}
        for name, start, numel, flat, offset in self._layout():
            known = find(name, start, numel)
            counts.setdefault(id(flat), set()).add(known.step if known else 0.0)
            if known is None:
                continue
            flat.data.view(-1)[offset : offset + numel].copy_(known.master)
            if known.moments:
                state = self.adamw.state[flat]
                state.setdefault("step", torch.zeros((), dtype=torch.float32, device=flat.device)).fill_(known.step)
                for key in MOMENTS:
                    moment = state.setdefault(key, torch.zeros_like(flat, memory_format=torch.preserve_format))
                    moment.view(-1)[offset : offset + numel].copy_(known.moments[key])
        assert all(len(steps) == 1 for steps in counts.values()), f"one group, several step counts: {counts}"

    def gathered(self, module: nn.Module) -> Any:
        """A context in which the module's weights are whole on every rank; all ranks enter it."""
        deepspeed = load_deepspeed(self.device)
        return deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=self.zero == 3)

    def destroy(self) -> None:
        """Takes DeepSpeed's hooks off the module; weights stay where they are (ZeRO-3: partitioned)."""
        self.engine.destroy()
        # DeepSpeed destroys once more whenever the garbage collector finds the engine, and would cut the next one's links to its masters
        self.engine.destroy = lambda: None
        if self.zero == 3:
            from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

            torch.nn.functional.linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", torch.nn.functional.linear)
        self.engine.optimizer = self.engine.basic_optimizer = None
        for params in self.params:
            for p in params:
                p.grad = None
        del self.engine, self.optimizer, self.adamw
