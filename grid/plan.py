"""The plan: a loaded study in; arms, stage graph, batch arithmetic and estimates out. Writes nothing, loads neither torch nor ray.

python -m grid.plan STUDY.yaml [--profile NAME|FILE] [--arms GLOB ...] [--set KEY=VALUE ...] [--json]
python -m grid.plan STUDY.yaml --simulate NODESxGPUS[:FAILURES_A_DAY] [--measured RUN] [--price AMOUNT]    plays it on such a cluster
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from grid import cost, features, options, towers
from grid.expand import Arm
from grid.graph import Graph, Stage
from grid.load import Loaded, load
from grid.models import Assets, Spec, stages_of
from grid.models import asked as asked_with
from grid.planfile import dump
from grid.profile import Profile
from grid.study import Benchmark
from trainers import judging, switches
from trainers.stages import KINDS


class Planner:
    """Adds every stage that the arms need to one graph."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.study, self.profile = loaded, loaded.study, loaded.profile
        self.graph = Graph()
        self.assets = Assets(self.study, self.profile, self.graph)
        self._models: dict[int, tuple[Spec, Spec | None, str | None]] = {}
        self._questions: dict[str, str] = {}
        self._zeroshot: dict[tuple[str, str], str] = {}

    def arm(self, arm: Arm) -> dict[str, Any]:
        """The plan.json entry of one arm; its stages are in the graph afterwards."""
        model, image, _ = self.model(arm)
        predictions: dict[str, str] = {}
        scores: dict[str, str] = {}
        zeroshot: dict[str, str] = {}
        controls: dict[str, str] = {}
        for name, benchmark in self.study.benchmarks.items():
            predictions[name], scores[name] = self.evaluated(arm.name, model, image, name, self.questions(name), benchmark)
            if benchmark.zeroshot and self.sees_by(arm, model):
                zeroshot[name] = self.zeroshot(arm.recipe.encoder, name)
            chosen = self.study.controls
            if arm.name in chosen.arms and (not chosen.benchmarks or name in chosen.benchmarks):
                questions = self.questions(name)
                spec = {"source": "permuted", "input": questions, "seed": chosen.seed}
                facts = self.graph[questions].facts
                permuted = self.graph.add("dataset", spec, f"permuted {name}", [questions], self.graph[questions].rows, **facts)
                controls[name] = self.evaluated(arm.name, model, image, f"permuted {name}", permuted, benchmark)[1]
        targets = [*scores.values(), *zeroshot.values(), *controls.values(), *stages_of(model)]
        stages = self.graph.closure(targets)
        for id in stages:
            self.graph[id].arms.append(arm.name)
        axes = {axis: arm.axes[axis] for axis in self.study.axes}
        return {
            "name": arm.name, "row": arm.row, "source": arm.source, "released": arm.released, "stands_in": arm.stands_in, "axes": axes,
            "init": arm.recipe.init, "seed": self.seed(arm), "changes": arm.changes or {}, "stages": stages, "scores": scores,
            "predictions": predictions, "controls": controls, "zeroshot": zeroshot,
        }  # fmt: skip

    def seed(self, arm: Arm) -> int:
        return self.study.seed if arm.recipe.seed is None else arm.recipe.seed

    def model(self, arm: Arm) -> tuple[Spec, Spec | None, str | None]:
        """(model after all training, ImageRecipe it is asked with, its pretraining stage or None)."""
        if id(arm) not in self._models:
            self._models[id(arm)] = self._model(arm)
        return self._models[id(arm)]

    def _model(self, arm: Arm) -> tuple[Spec, Spec | None, str | None]:
        recipe, seed = arm.recipe, self.seed(arm)
        asked = self.study.evaluation.fit or recipe.finetune.fit
        if arm.released and self.profile.models[arm.released].stand_in is None:
            model, pixels = self.assets.whole(arm.released, recipe.llm)
            return model, self.assets.image(pixels, asked), None
        pretraining = None
        if recipe.model is not None:
            model, pixels = self.assets.whole(recipe.model, recipe.llm)
        else:
            pixels = self.profile.encoders[recipe.encoder].image
            connector = {"builder": recipe.connector.builder, "depth": recipe.connector.depth}
            model = self.assets.composed(recipe.encoder, recipe.llm, connector, self.connector(arm, seed))
            if recipe.init == "fresh" and "none" not in recipe.pretrain.data:
                image = self.assets.image(pixels, recipe.pretrain.fit)
                model = self.assets.train(model, recipe.pretrain, f"pretrain {arm.name}", image, seed)
                pretraining = stages_of({"parts": {"connector": model["parts"]["connector"]}})[0]
        if "none" not in recipe.finetune.data:
            model = self.assets.train(model, recipe.finetune, f"finetune {arm.name}", self.assets.image(pixels, recipe.finetune.fit), seed)
        return model, self.assets.image(pixels, asked), pretraining

    def connector(self, arm: Arm, seed: int) -> Spec:
        """Where a connector starts: fresh from the arm's seed, or a released one."""
        if arm.recipe.init == "fresh":
            return {"fresh": seed}
        bridge = self.profile.connectors[arm.recipe.init]
        if bridge.of is None:
            return {"checkpoint": bridge.checkpoint, "revision": bridge.revision}
        origin = next(a for a in self.loaded.everything if a.released == bridge.of)
        return {"stage": self.model(origin)[2], "part": "connector"}

    def questions(self, benchmark: str) -> str:
        """The rows artefact of a benchmark's questions."""
        if benchmark not in self._questions:
            self._questions[benchmark] = self._ask(benchmark)
        return self._questions[benchmark]

    def _ask(self, benchmark: str) -> str:
        chosen = self.study.benchmarks[benchmark]
        rows = self.assets.data(chosen.data)
        if chosen.negatives != "mined":
            return rows
        mining = self.study.mining
        assert mining is not None
        similarities = self.similarities(mining.miner, rows, benchmark)
        spec = {"similarities": similarities, "rows": rows, "k": mining.k, "seed": mining.seed, "question": mining.question}
        return self.graph.add(
            "choices", spec, f"choices {benchmark}", [similarities, rows], self.graph[rows].rows, tokens=60.0, images=1.0, megabytes=5.0
        )

    def similarities(self, encoder: str, rows: str, benchmark: str, template: Any = None) -> str:
        """Image-label similarities of a CLIP over labelled rows; embeddings are shared by whoever asks. template: the classes' texts."""
        model, asset = self.assets.clip(encoder), self.profile.encoders[encoder]
        mining = self.study.mining
        template = template or (mining.template if mining else "a photo of a {}")
        fit = "crop" if asset.builder == "open_clip" else "squash"  # as CLIP and SigLIP were released
        image, count = self.assets.image(asset.image, fit), self.graph[rows].rows
        spec: Spec = {"model": model, "rows": rows, "image": image, "precision": self.profile.precision}
        needs = [rows, *stages_of(model)]
        embeddings = self.graph.add("embeddings", spec, f"embed {benchmark} {encoder}", needs, count, images=1.0)
        spec = {"embeddings": embeddings, "model": model, "rows": rows, "template": template}
        return self.graph.add("similarities", spec, f"similarities {benchmark} {encoder}", [embeddings, *needs], count)

    def sees_by(self, arm: Arm, model: Spec) -> bool:
        """Whether an arm's encoder stands on its own as a classifier to hold the arm against: a model made here, or a released one beside
        which the study names an encoder that the profile has whole."""
        if model["family"] != "existing" and (model["family"] != "vlm" or (arm.released and not arm.stands_in)):
            return False
        encoder = self.profile.encoders.get(arm.recipe.encoder)
        return encoder is not None and towers.classifies(encoder)

    def zeroshot(self, encoder: str, benchmark: str) -> str:
        """The scores of an arm's encoder as a zero-shot classifier."""
        if (encoder, benchmark) not in self._zeroshot:
            chosen = self.study.benchmarks[benchmark]
            rows, questions = self.assets.data(chosen.data), self.questions(benchmark)
            template = {"ensemble": chosen.ensemble} if chosen.ensemble else chosen.templates
            similarities = self.similarities(encoder, rows, benchmark, template)
            spec = {"similarities": similarities, "rows": rows, "choices": questions, "metric": chosen.metric}
            id = self.graph.add(
                "zeroshot", spec, f"zero-shot {benchmark} {encoder}", [similarities, rows, questions], self.graph[rows].rows
            )
            self._zeroshot[encoder, benchmark] = id
        return self._zeroshot[encoder, benchmark]

    def evaluated(self, arm: str, model: Spec, image: Spec | None, name: str, questions: str, benchmark: Benchmark) -> tuple[str, str]:
        """(prediction stage, score stage) of a model on questions. name: what they are called."""
        how = benchmark.asked(self.study.evaluation)
        suffix, methods = asked_with(model, how)
        asked = methods[0] if len(methods) == 1 else sorted(methods)  # which of them is the score's value is no question to a model
        spec: Spec = {
            "model": model, "questions": questions, "image": image, "suffix": suffix, "method": asked,
            "max_new_tokens": how.max_new_tokens, "precision": self.profile.precision,
            **({"listed": False} if how.options == "hidden" else {}),
        }  # fmt: skip
        rows, facts = self.graph[questions].rows, self.graph[questions].facts
        predictions = self.graph.add("predict", spec, f"predict {arm} {name}", [questions, *stages_of(model)], rows, **facts)
        spec = {"predictions": predictions, "rule": how.rule, "metric": benchmark.metric, "method": methods[0]}
        needs = [predictions]
        if how.judge is not None and benchmark.judge is not None:
            spec |= {"judge": judging.identity(how.judge.model, benchmark.judge), "questions": questions}
            needs.append(questions)
        return predictions, self.graph.add("score", spec, f"score {arm} {name}", needs, rows)

    def runtime(self, stage: Stage) -> dict[str, Any]:
        """Knobs that can't change the result."""
        resources, judge = self.profile.resources, self.study.evaluation.judge
        asked = {name: value for name, value in vars(judge).items() if name != "model"} if judge and "judge" in stage.spec else None
        return {
            **({"judge": asked} if asked else {}),
            "world": resources.workers if KINDS[stage.kind].collective else 1,
            "zero": resources.zero, "micro_tokens": resources.micro_tokens, "checkpoint_steps": resources.checkpoint_steps,
            "activation_checkpointing": resources.activation_checkpointing, "offload": resources.offload,
            "eval_batch": resources.eval_batch, "device_tflops": self.profile.device.tflops,
            **({"disable": sorted(switches.named(resources.disable))} if resources.disable else {}),
        }  # fmt: skip


def plan(loaded: Loaded) -> dict[str, Any]:
    """plan.json as a dictionary."""
    planner = Planner(loaded)
    entries = [planner.arm(arm) for arm in loaded.arms]
    study, profile = loaded.study, loaded.profile
    estimator = cost.Estimator(planner.graph, profile)
    for stage in planner.graph.stages.values():
        stage.runtime = planner.runtime(stage)
        estimator.fill(stage)
    outputs = features.groups(planner.graph, estimator)
    stages = [stage for stage in planner.graph.stages.values() if stage.arms]
    contrasts = [{"name": c.name, "axis": c.axis, "from": c.from_, "to": c.to, "where": c.where} for c in study.contrasts]
    return {
        "study": {
            "name": study.study, "question": study.question, "file": loaded.file,
            "profile": profile.profile, "profile_reason": loaded.reason,
            "about": profile.about, "miniature": profile.miniature, "seed": study.seed, "compatibility": study.compatibility,
            "batch_scale": profile.batch_scale, "allow_subset": _subsets(stages),
            "assumptions": [*({"key": a.key, "value": a.value, "text": a.text} for a in study.assumptions), *loaded.assumed],
            "scaled": loaded.scaled,
            "notices": loaded.notices, "doubts": loaded.doubts, "general_axis": _general_axis(loaded),
        },
        "groups": study.groups,
        "contrasts": contrasts,
        "run": run_section(profile),
        "published": str(loaded.published) if loaded.published else None,
        "arms": [entry for entry in entries if entry["source"] == "trained"],
        "references": [entry for entry in entries if entry["source"] == "released"],
        "stages": [stage.plain() for stage in stages],
        "features": outputs,
        "totals": cost.totals(stages, entries, profile, study.paper_cost),
    }  # fmt: skip


def _general_axis(loaded: Loaded) -> dict[str, str] | None:
    axis = loaded.study.general_axis
    return None if axis is None else {"name": axis.name, "file": str(loaded.directory / axis.file)}


def _subsets(stages: Sequence[Stage]) -> list[str]:
    """Names of the data sets that may be smaller than published."""
    return [stage.name.removeprefix("data ") for stage in stages if stage.kind == "dataset" and stage.spec.get("allow_subset")]


def make_plan(study: str | Path, *, profile: str | None = None, arms: Sequence[str] = (), sets: Sequence[str] = ()) -> dict[str, Any]:
    """The plan of a study file: what `grid.run` works off. Raises UserErrors with every mistake of study, profile and settings."""
    return plan(load(study, profile, sets, arms))


RUN_KEYS = (
    "lanes", "workers", "gpus_per_worker", "cpus", "device", "threads", "object_store_mb", "cache_mb", "pixels_mb", "features_mb",
    "attempts", "trials", "collective_seconds", "grace_seconds", "budget_seconds", "dashboard",
)  # fmt: skip
"""Resources that are the run's, not a stage's."""


def run_section(profile: Profile) -> dict[str, Any]:
    """How a run uses its machine (grid.settings.Settings)."""
    places = {
        "store": profile.store,
        "data_root": profile.data_root,
        "tracking_uri": profile.tracking.uri,
    }
    return {**{key: getattr(profile.resources, key) for key in RUN_KEYS}, **places}


def steps(rows: int, batch: int, epochs: float | None, fixed: int | None) -> int:
    """Optimiser steps of a stage; the last, partial batch counts."""
    return fixed if fixed is not None else max(1, math.ceil((epochs or 0) * rows / batch))


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser("grid.plan", __doc__)
    options.study(parser)
    options.simulation(parser)
    parser.add_argument("--json", action="store_true", help="the whole plan, or the simulations, as JSON")
    given = parser.parse_args(argv)
    if not given.simulate and (given.measured or given.price is not None or given.assume):
        raise UserError("--measured, --price and --assume are a simulation's", hint="--simulate 4x8")
    gc.disable()  # a plan only grows, and thousands of arms are millions of objects
    loaded = load(given.study, given.profile, given.set, given.arms)
    made = plan(loaded)
    if given.simulate:
        from grid import simulate

        print(simulate.command(made, given) if given.json else f"{loaded.headline}\n{simulate.command(made, given)}")
    elif given.json:
        sys.stdout.write(dump(made))
    else:
        from grid import plantext

        print(loaded.headline)
        print(plantext.render(made, loaded))
    return 0


if __name__ == "__main__":
    options.run(main)
