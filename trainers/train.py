"""The `train` stage: weights and rows in, trained parts out. `run(spec, ctx)` on every rank of a worker group.

    data stream (prefetches from here on) ─► model ─► phase 1: engine, steps ─► phase 2: engine on the same module, steps ─► artefact

In: a train spec, rows artefacts, checkpoints of an earlier attempt in `ctx.work`. Out in `ctx.out`: `<part>.safetensors` for every trained
part (adapters merged, and beside it in `adapters/<part>/`) and `model.json` (the ModelSpec after training); a summary; one metrics
record a step.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets_ray.encoding import Encoding, Stats
from datasets_ray.errors import UserError, nearest
from datasets_ray.images import ImageRecipe
from datasets_ray.pipeline import index_of, train_batches
from trainers import adapters, checkpoint, features, models, optim, switches
from trainers.batch import Filler, to_device
from trainers.checkpoint import Checkpoint, Progress
from trainers.context import Context, Interrupted
from trainers.engine import Engine, Fragment
from trainers.meter import Meter
from trainers.objectives import Objective, load_objective
from trainers.specs import trained as trained_weights
from trainers.step import train_step
from trainers.store import sha256

log = logging.getLogger(__name__)

DROPPED_SHARE = 0.02
"""More rows than this missing from their steps fail the stage."""
WATCHED = 256
"""Elements of each newly trained parameter that are watched until they move."""


def run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    """Trains a stage from where it stands to its end. Returns the summary (rank 0's counts)."""
    with switches.without(ctx.runtime.get("disable", ())):
        training = Training(spec, ctx)
        try:
            return training.run()
        finally:
            training.close()


def encoding_of(spec: Mapping[str, Any], objective: Objective) -> Encoding:
    """How this stage's rows become the objective's streams."""
    model, data = spec["model"], spec["data"]
    tokenizer = model.get("tokenizer") or model["parts"].get("encoder", {}).get("config", {}).get("tokenizer")
    return Encoding.of(
        tokenizer=tokenizer, template=data.get("template") or model.get("template") or "plain",
        image=data.get("image"), max_tokens=data["max_tokens"], streams=dict(objective.streams),
    )  # fmt: skip


def filler_of(recipe: ImageRecipe | None) -> Filler | None:
    """A black image in a size that the recipe makes."""
    if recipe is None:
        return None
    made = recipe.layout(64, 64)
    patch: int = recipe.patch  # type: ignore[attr-defined]
    return Filler(np.zeros((made.grid_h * patch, made.grid_w * patch, 3), np.uint8), recipe.uniform, (1, made.grid_h, made.grid_w))


class Training:
    """One attempt at a train stage."""

    def __init__(self, spec: dict[str, Any], ctx: Context) -> None:
        self.spec, self.ctx = spec, ctx
        self.seconds: dict[str, float] = {}
        """Where this attempt's time went."""
        self.notes: list[str] = []
        self.freeze: list[dict[str, Any]] = []
        self.parked: dict[str, Fragment] = {}
        """What is kept of parameters that the stage has trained and the current engine doesn't."""
        self.engine: Engine | None = None
        if spec["optimizer"].get("name", "adamw") != "adamw":
            raise UserError(f"unknown optimizer {spec['optimizer']['name']!r}", hint=nearest(spec["optimizer"]["name"], ["adamw"]))

    @contextmanager
    def timed(self, section: str) -> Generator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[section] = self.seconds.get(section, 0.0) + time.perf_counter() - begin

    def run(self) -> dict[str, Any]:
        spec, ctx = self.spec, self.ctx
        objective = load_objective(spec["objective"])
        encoding = encoding_of(spec, objective)
        self.filler = filler_of(encoding.image)
        directories = [ctx.inputs(id) for id in spec["data"]["rows"]]
        index = index_of(
            directories, spec["batch"], epochs=spec.get("epochs"), steps=spec.get("steps"), seed=spec["seed"],
            order=spec["data"].get("order", "shuffle"),
        )  # fmt: skip
        self.steps = len(index)
        phases = optim.plan_phases(spec["phases"], self.steps)
        self.factor = optim.schedule(spec.get("schedule", "cosine"), self.steps, spec.get("warmup", 0.0))
        saved = checkpoint.latest(ctx.work, ctx.rank, ctx.world)
        self.progress = saved.progress if saved else Progress()
        self.meter = Meter(ctx, self.progress, self.steps, spec.get("precision", "fp32"))
        self.before = Stats.from_json(self.progress.data) if self.progress.data else Stats()
        if saved:
            self.notes += [f"went on from step {self.progress.step}", *(f"torn checkpoint {torn}" for torn in saved.passed_over)]
        known, model = None, None
        if (why := features.why_not(spec, ctx, encoding.image)) is None:
            model = self.build(saved)  # whose features are found decides which pixels are read
            known = features.store_of(model, ctx)
            why = "features aren't kept: the encoder doesn't answer alike twice" if known is None else None
        self.notes += [why] if why else []
        self.stream = train_batches(
            directories, encoding, index, self.progress.step, ctx.rank, ctx.world,
            ctx.runtime.get("micro_tokens", 4096) if switches.on("packs") else 1,
            name=ctx.stage.get("name", "train"), store=ctx.pixels if switches.on("pixels") else None, features=known,
        )  # fmt: skip
        with self.stream:
            if model is None:
                model = self.build(saved)
            for phase in phases:
                if phase.last > self.progress.step:
                    self.train_phase(phase, model, objective, saved)
                    saved = None
        self.stats().check(DROPPED_SHARE)
        with self.timed("export"):
            files = self.export(model, [part for part in model.parts if any(part in phase.learning_rates for phase in phases)])
        return self.summary(files)

    def build(self, saved: Checkpoint | None) -> Any:
        """The model as it starts, or as it was saved."""
        with self.timed("model"):
            torch.manual_seed(self.spec["seed"])
            model = models.build(self.spec["model"], self.ctx)
            adapters.attach(model, self.spec.get("adapters"), self.spec["seed"])
            if saved:
                saved.load_weights(model)
        return model

    def stats(self) -> Stats:
        """What has happened to the rows, over all attempts."""
        total = Stats.from_json(self.before.to_json())
        total.add(self.stream.stats)
        return total

    # ── a phase ──────────────────────────────────────────────────────────────────────────────────────────────────────────
    def train_phase(self, phase: optim.Phase, model: Any, objective: Objective, saved: Checkpoint | None) -> None:
        """The steps of a phase that are still to do. saved: what to go on from, if this attempt hasn't trained yet."""
        ctx, progress = self.ctx, self.progress
        with self.timed("engine"):
            engine = self.open_engine(phase, model, objective)
            watched = self.carry_over(engine, saved)
        every = ctx.runtime.get("checkpoint_steps") or self.steps
        with ctx.working(), self.timed("steps"):
            self.meter.begin()
            while progress.step < phase.last:
                rates = {part: rate * self.factor(progress.step) for part, rate in phase.learning_rates.items()}
                waited = self.stream.waited
                batches = [to_device(batch, ctx.device, self.filler, engine.same_modules) for batch in next(self.stream)]
                waited = self.stream.waited - waited
                share = train_step(engine, objective, batches, rates)
                progress.step += 1
                self.meter.push(engine, share, bool(objective.gathers), batches, rates, waited)
                if watched and all(rates.values()):
                    watched = self.check_moves(engine, watched)
                stopping = ctx.stopping(progress.step)
                if stopping or (progress.step % every == 0 and progress.step < self.steps):
                    self.save(engine, phase)
                if stopping:
                    raise Interrupted(f"saved after step {progress.step} of {self.steps}")
            self.meter.flush()
        if phase.last < self.steps:
            self.parked |= {name: fragment.clone() for name, fragment in engine.fragments().items()}
            self.close()

    def open_engine(self, phase: optim.Phase, model: Any, objective: Objective) -> Engine:
        """Freezes, counts and says what is frozen, and puts an engine over the rest."""
        spec, ctx = self.spec, self.ctx
        models.train_parts(model, set(phase.learning_rates))
        adapters.freeze_rest(model)
        model.train()
        rates = phase.learning_rates
        rows = [{**row, "phase": phase.number, "learning_rate": rates.get(row["part"])} for row in models.freeze_table(model)]
        for row in rows:
            log.info("phase %(phase)d: %(part)s trains %(trainable)d of %(parameters)d parameters at %(learning_rate)s", row)
        ctx.report({"step": self.progress.step, **{f"train/trainable/{row['part']}": row["trainable"] for row in rows}})
        self.freeze += rows
        groups = optim.parameter_groups(model.parts, phase.learning_rates, spec["optimizer"].get("weight_decay", 0.0))
        zero, precision, offload = ctx.runtime.get("zero", 0), spec.get("precision", "fp32"), bool(ctx.runtime.get("offload", False))
        self.engine = Engine(
            model, objective, groups, spec["optimizer"], zero=zero, precision=precision, clip=spec.get("clip"),
            device=ctx.device, rank=ctx.rank, world=ctx.world, offload=offload, more=ctx.runtime.get("deepspeed"),
        )  # fmt: skip
        self.meter.watch(model)  # where it is now decides what is computed
        if self.engine.zero != zero:
            why = "state is offloaded from ZeRO 2 on" if offload else f"{precision} gradients are accumulated in fp32 from ZeRO 1 on"
            self.notes.append(f"ZeRO {self.engine.zero} instead of {zero}: {why}")
        return self.engine

    def carry_over(self, engine: Engine, saved: Checkpoint | None) -> dict[str, Tensor]:
        """Moments and masters into the new engine. Returns samples of parameters that start being trained in this phase."""
        trained = {name for names in engine.names for name in names}
        if saved:
            engine.restore(saved.find)
            self.parked = {name: found for name in saved.steps if name not in trained and (found := saved.find(name))}
            saved.load_rng(engine.rank)
            return {}
        known = self.parked
        engine.restore(lambda name, start, numel: known[name].part(start, numel) if name in known else None)
        self.parked = {name: fragment for name, fragment in known.items() if name not in trained}
        if not self.progress.step:
            return {}
        return {name: f.master[:WATCHED].clone() for name, f in engine.fragments().items() if name not in known}

    def check_moves(self, engine: Engine, watched: dict[str, Tensor]) -> dict[str, Tensor]:
        """After the first step of newly unfrozen parts: RuntimeError if one of them stayed where it was."""
        moved = {name.split(".")[1]: 0.0 for name in watched}
        for name, fragment in engine.fragments().items():
            if name in watched and not torch.equal(fragment.master[:WATCHED], watched[name]):
                moved[name.split(".")[1]] = 1.0
        counts = engine.sum_over_ranks(torch.tensor(list(moved.values()), device=engine.device)).tolist()
        still = [part for part, count in zip(moved, counts) if not count]
        if still:
            raise RuntimeError(f"unfrozen at step {self.progress.step}, and its weights don't move: {', '.join(still)}")
        return {}

    def save(self, engine: Engine, phase: optim.Phase) -> None:
        with self.timed("checkpoints"):
            self.meter.flush()
            self.progress.phase, self.progress.data = phase.number, self.stats().to_json()
            checkpoint.save(self.ctx.work, self.progress, engine, self.parked, self.ctx.guard)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.destroy()
            self.engine = None

    # ── the artefact ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def export(self, model: Any, parts: list[str]) -> dict[str, str]:
        """Writes what was trained; returns sha256 by file (rank 0)."""
        ctx = self.ctx
        files: dict[str, str] = {}
        ctx.guard()
        for part in parts:
            with (self.engine.gathered(model.parts[part]) if self.engine else _nothing()):
                if ctx.rank == 0:
                    beside = adapters.merge(model.parts[part], ctx.out / "adapters" / part)
                    path = models.save_part(model, part, ctx.out / f"{part}.safetensors")
                    files |= {file.relative_to(ctx.out).as_posix(): sha256(file) for file in (path, *beside)}
        if ctx.rank == 0:
            after = copy.deepcopy(self.spec["model"])
            for part in parts:
                after["parts"][part]["weights"] = trained_weights(after["parts"][part]["weights"], ctx.stage["id"])
            (ctx.out / "model.json").write_text(json.dumps(after, indent=1, sort_keys=True))
        return files

    def summary(self, files: dict[str, str]) -> dict[str, Any]:
        progress, stats = self.progress, self.stats()
        tail = progress.losses[-max(1, len(progress.losses) // 10) :]
        return {
            "steps": progress.step, "samples": progress.samples, "tokens": progress.tokens, "valid_tokens": progress.valid_tokens,
            "loss": {"first": progress.losses[0], "last": progress.losses[-1], "last_tenth": sum(tail) / len(tail)},
            "data": stats.to_json(), "frozen": self.freeze,
            **{name: found.to_json() if (found := getattr(self.stream, name)) else None for name in ("pixels", "features")},
            "seconds": {**self.seconds, "waiting": self.stream.waited},
            "compute": self.meter.compute(), "sha256": files, "notes": self.notes,
        }  # fmt: skip


@contextmanager
def _nothing() -> Generator[None]:
    yield
