"""From names to model specs: a profile's assets become parts with weights, and the training stages that make those weights.

In: profile, study, graph. Out: `ModelSpec` dictionaries (`trainers.specs`) whose weights point at stages or checkpoints.
"""

from __future__ import annotations

from typing import Any

from datasets_ray.errors import UserError
from datasets_ray.policy import MOST_DROPPED
from grid import towers
from grid.graph import Graph
from grid.load import as_plain
from grid.profile import CLIP, Asset, Data, Image, Profile
from grid.recipe import Training
from grid.study import Evaluation, Study
from trainers import families
from trainers.specs import trained as trained_weights

Spec = dict[str, Any]
BUILDERS: dict[str, dict[str, str]] = {
    "vlm": {"encoder": "transformers_vision", "connector": "mlp", "llm": "causal_lm"},
    "qwen2_vl": {"encoder": "qwen2_vl", "connector": "qwen2_vl", "llm": "qwen2_vl"},
    "existing": {"model": "transformers"},
}
"""Family of a whole model → who builds its parts."""


class Assets:
    """Asset names → specs; training stages are added to the graph on first use."""

    def __init__(self, study: Study, profile: Profile, graph: Graph) -> None:
        self.study, self.profile, self.graph = study, profile, graph
        self._known: dict[Any, Any] = {}

    # data

    def data(self, name: str) -> str:
        """The dataset stage of a profile's data set."""
        if ("data", name) not in self._known:
            asset = self.profile.data[name]
            if asset.concat:
                inputs = [self.data(other) for other in asset.concat]
                rows = sum(self.graph[i].rows for i in inputs)
                spec: Spec = {"source": "concat", "inputs": inputs}
                facts = {
                    key: sum(self.graph[i].facts[key] * self.graph[i].rows for i in inputs) / rows
                    for key in ("tokens", "images", "megabytes")
                }
                id = self.graph.add("dataset", spec, f"data {name}", inputs, rows, **facts)
            else:
                revision = {"revision": asset.revision} if asset.revision else {}
                spec = {"source": asset.source, **asset.keys, **revision, **self._held_to(asset)}
                rows = int(asset.keys["rows"] if isinstance(asset.keys.get("rows"), int) else asset.rows or asset.expect or 0)
                id = self.graph.add(
                    "dataset", spec, f"data {name}", [], rows, tokens=asset.tokens, images=asset.images, megabytes=asset.megabytes
                )
            self._known["data", name] = id
        return self._known["data", name]

    def _held_to(self, asset: Data) -> Spec:
        """What every source is held to, of what is given: the published count, whether fewer will do, the share that may be dropped."""
        subset = self.profile.allow_subset if asset.allow_subset is None else asset.allow_subset
        most = self.study.limits.dropped
        if most is None and asset.expect is not None:
            most = MOST_DROPPED
        given = {"expect": asset.expect, "allow_subset": subset or None, "most_dropped": most}
        return {key: value for key, value in given.items() if value is not None}

    # models

    def image(self, image: Image | None, fit: str | None) -> Spec | None:
        """ImageRecipe of an encoder's pixels; fit: crop, pad or squash. None where a model's own processor makes them."""
        if image is None:
            return None
        key = ("image", id(image), fit)
        if key not in self._known:
            self._known[key] = image, self.graph.share(self._image(image, fit))
        return self._known[key][1]

    @staticmethod
    def _image(image: Image, fit: str | None) -> Spec:
        colours = {"mean": image.mean or list(CLIP[0]), "std": image.std or list(CLIP[1])}
        if image.kind == "native":
            return {key: getattr(image, key) for key in ("kind", "patch", "merge", "min_pixels", "max_pixels")} | colours
        return {"kind": "square", "size": image.size, "patch": image.patch, "fit": fit or "crop", **colours}

    def clip(self, name: str) -> Spec:
        """A whole CLIP (both towers): mines, embeds, classifies. Its part `encoder` is an arm's vision encoder."""
        if ("clip", name) not in self._known:
            asset = self.profile.encoders[name]
            if not towers.classifies(asset):
                why, hint = f"a {asset.builder} has no text tower of CLIP's", "`zeroshot: false` in the benchmarks, or an open_clip encoder"
                raise UserError(f"encoder {name!r} can't mine, classify or be trained here", why=why, hint=hint)
            model: Spec = {"family": "clip", "parts": {"encoder": self._part(asset.builder, asset, asset.seed)}}
            for index, training in enumerate(asset.trained):
                label = f"encoder {name}" + (f" {index + 1}/{len(asset.trained)}" if len(asset.trained) > 1 else "")
                model = self.train(model, training, label, self.image(asset.image, training.fit), asset.seed)
            self._known["clip", name] = self._shared(model)
        return self._known["clip", name]

    def encoder(self, name: str) -> Spec:
        """The part that an arm sees with."""
        asset = self.profile.encoders[name]
        if asset.builder == "open_clip" or asset.trained:
            return self.clip(name)["parts"]["encoder"]
        if ("encoder", name) not in self._known:
            self._known["encoder", name] = self.graph.share(self._part(asset.builder, asset, asset.seed))
        return self._known["encoder", name]

    def llm(self, name: str) -> Spec:
        """A causal language model with its tokenizer and template."""
        if ("llm", name) not in self._known:
            asset = self.profile.llms[name]
            if asset.initial:
                first = self.llm(asset.initial)
                model: Spec = {**first, "parts": dict(first["parts"])}
            else:
                tokenizer = asset.tokenizer or _pinned(asset)
                model = {"family": "causal_lm", "tokenizer": tokenizer, "parts": {"llm": self._part("causal_lm", asset, asset.seed)}}
            model["template"] = self.template(name)
            if asset.tokenizer:
                model["tokenizer"] = asset.tokenizer
            for index, training in enumerate(asset.trained):
                label = f"llm {name}" + (f" {index + 1}/{len(asset.trained)}" if len(asset.trained) > 1 else "")
                model = self.train(model, training, label, None, asset.seed)
            self._known["llm", name] = self._shared(model)
        return self._known["llm", name]

    def template(self, llm: str) -> str:
        """The conversation template that the study gives a language model."""
        template = self.study.templates.get(llm)
        if template is None:
            raise UserError(f"no conversation template for {llm!r}", hint=f"add `templates: {{{llm}: ...}}` to the study")
        return template

    def whole(self, name: str, llm: str) -> tuple[Spec, Image | None]:
        """A whole architecture (qwen2_vl, or a released vlm) and the pixels it takes; None: its own processor makes them."""
        if ("whole", name) not in self._known:
            asset = self.profile.models[name]
            if asset.initial:
                first, image = self.whole(asset.initial, llm)
                model: Spec = {**first, "parts": dict(first["parts"])}
                image = asset.image or image
            elif asset.family == "existing":
                part, image = self._part(BUILDERS["existing"]["model"], asset, asset.seed), None
                prompts = families.asked(asset.prompts or "default")
                model = {"family": "existing", "prompts": prompts, "remote_code": asset.remote_code, "parts": {"model": part}}
            else:
                image = asset.image or Image(size=336, patch=14)
                template = asset.template or self.template(llm)
                parts = {part: self._part(builder, asset, asset.seed, part) for part, builder in BUILDERS[asset.family].items()}
                model = {"family": asset.family, "template": template, "tokenizer": asset.tokenizer or _pinned(asset), "parts": parts}
            for index, training in enumerate(asset.trained):
                label = f"model {name}" + (f" {index + 1}/{len(asset.trained)}" if len(asset.trained) > 1 else "")
                model = self.train(model, training, label, self.image(image, training.fit), asset.seed)
            self._known["whole", name] = self._shared(model), image
        return self._known["whole", name]

    def composed(self, encoder: str, llm: str, connector: Spec, weights: Spec) -> Spec:
        """encoder → connector → language model. weights: where the connector's come from."""
        eye, language = self.encoder(encoder), self.llm(llm)
        bridge = {
            "builder": connector["builder"],
            "config": {"depth": connector["depth"]} if connector["builder"] == "mlp" else {},
            "weights": weights,
        }
        parts = {"encoder": eye, "connector": bridge, "llm": language["parts"]["llm"]}
        return {"family": "vlm", "template": language["template"], "tokenizer": language["tokenizer"], "parts": parts}

    def _shared(self, model: Spec) -> Spec:
        """The model; its parts stand in the specs of many arms."""
        for part in model["parts"].values():
            self.graph.share(part)
        return model

    def _part(self, builder: str, asset: Asset, seed: int, name: str | None = None) -> Spec:
        """A part with the asset's weights. name: the part of a `vlm`, whose config holds one for each of its parts."""
        weights: Spec = {"checkpoint": asset.checkpoint, "revision": asset.revision} if asset.checkpoint else {"fresh": seed}
        config = asset.config or {}
        if name is not None and builder != "qwen2_vl":
            config = config.get(name, {})
        return {"builder": builder, "config": self.graph.share(config), "weights": weights}

    # training

    def train(self, model: Spec, training: Training, name: str, image: Spec | None, seed: int) -> Spec:
        """Adds the training stage and returns the model after it: trained parts point at the stage, others stay."""
        static, rows, facts, trained = self._static(training, model.get("template"), image)
        spec: Spec = {"model": model, **static, "seed": seed if training.seed is None else training.seed}
        total = sum(self.graph[i].rows for i in rows)
        id = self.graph.add("train", spec, name, [*rows, *stages_of(model)], total, **facts)
        parts = dict(model["parts"])
        parts |= {key: {**parts[key], "weights": trained_weights(parts[key]["weights"], id)} for key in trained & parts.keys()}
        return {**model, "parts": parts}

    def _static(self, training: Training, template: str | None, image: Spec | None) -> tuple[Spec, list[str], dict[str, float], set[str]]:
        """What all arms with this training share: (spec without model and seed, dataset stages, mean facts of a row, trained parts)."""
        key = ("training", id(training), template, id(image))
        if key not in self._known:
            names = [training.data] if isinstance(training.data, str) else training.data
            rows = [self.data(name) for name in names]
            share = self.graph.share
            data: Spec = {
                "rows": rows, "image": image, "max_tokens": training.max_tokens, "order": training.order,
                "template": training.template or template,
            }  # fmt: skip
            spec: Spec = {
                "data": share(data),
                "objective": share(training.objective),
                "phases": share([{"until": phase.until, "learning_rates": phase.learning_rates} for phase in training.phases]),
                "batch": max(1, round(training.batch * self.profile.batch_scale)),
                **({"steps": training.steps} if training.steps is not None else {"epochs": training.epochs}),
                "optimizer": share(as_plain(training.optimizer)),
                "schedule": training.schedule, "warmup": training.warmup, "clip": training.clip,
                "precision": self.profile.precision,
                **({"adapters": share(as_plain(training.adapters))} if training.adapters else {}),
            }  # fmt: skip
            total = sum(self.graph[i].rows for i in rows)
            facts = {fact: sum(self.graph[i].facts[fact] * self.graph[i].rows for i in rows) / total for fact in ("tokens", "images")}
            trained = {part for phase in training.phases for part in phase.learning_rates}
            self._known[key] = spec, rows, facts, trained, (training, image)
        return self._known[key][:4]


def _pinned(asset: Asset) -> str | None:
    """The checkpoint's tokenizer as `datasets_ray.tokens.load_tokenizer` takes it: of the revision that its weights are of."""
    return f"{asset.checkpoint}@{asset.revision}" if asset.checkpoint and asset.revision else asset.checkpoint


def asked(model: Spec, how: Evaluation) -> tuple[str, list[str]]:
    """(last line of a prompt, methods) for a model. A released one with its own processor has its family's words and no likelihoods;
    UserError where its score would be one."""
    methods: list[str] = [how.method] if isinstance(how.method, str) else [*how.method]
    if model["family"] != "existing":
        return how.suffix, methods
    if methods[0] == "likelihood":
        checkpoint = model["parts"]["model"]["weights"]["checkpoint"]
        why, hint = "its own processor shares no prefixes between options", "evaluation.method: [generate, likelihood]"
        raise UserError(f"{checkpoint} can't be scored by likelihood", why=why, hint=hint)
    return "", [method for method in methods if method != "likelihood"]


def stages_of(model: Spec) -> list[str]:
    """The stages that a model's weights come from."""
    return [part["weights"]["stage"] for part in model["parts"].values() if "stage" in part["weights"]]
