"""Models at their true size on no device: sizes counted, shapes checked, example rows walked through. No weights, no network, no engine.

    python -m trainers.hollow < request.json          one JSON object on the last line of stdout

In: `{"models": {key: {"spec", "image"}}, "trainings": [{"id", "model", "phases", "adapters"}], "sets": {dataset stage: spec},
"walks": [{"id", "model", "data", "image", "template", "max_tokens", "objective"}], "asked": [{"id", "model", "data", "image", "template",
"suffix"}], "seen": [{"id", "model", "data", "image"}]}`, whose model specs have fresh weights and whole configs.
Out: `{"models", "trainings", "walks", "failures", "notes"}`. Modules are the real ones, built on torch's meta device: every operation of a
forward pass says its output's shape and computes nothing. Rows are drawn in each data set's published layout (`datasets_ray.examples`),
read by its reader and encoded with the committed small tokenizers, since a real vocabulary can't be had offline.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets_ray import examples, sources
from datasets_ray.encoding import Encoding
from datasets_ray.errors import UserError, run_command
from datasets_ray.images import recipe_from_json
from datasets_ray.packing import Batch
from datasets_ray.pipeline import ImageTask, TrainTask
from datasets_ray.questions import Pixels, prepare, question_pack
from datasets_ray.rows import open_rows
from trainers import adapters, models
from trainers.batch import TensorPack, to_device
from trainers.context import Context
from trainers.models import attention
from trainers.objectives import load_objective

META = torch.device("meta")
MICRO_TOKENS = 4096


class Unfit(Exception):
    """A check that failed; the text says which and how."""


class Hollow:
    """Everything of one request; what it has built is kept."""

    def __init__(self, request: dict[str, Any], folder: Path) -> None:
        self.request, self.folder = request, folder
        self.failures: list[str] = []
        self.built: dict[str, Any] = {}
        self.rows: dict[str, Path] = {}
        self.notes: list[str] = []

    def run(self) -> dict[str, Any]:
        request = self.request
        sizes = {key: self._tried(f"model {key}", partial(self.sizes, key)) for key in request["models"]}
        trainings = {t["id"]: self._tried(t["name"], partial(self.training, t)) for t in request["trainings"]}
        for id, spec in request["sets"].items():
            self._tried(spec.get("name", id), partial(self.make, id, spec))
        walks = []
        ways: tuple[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]], ...] = (
            ("walks", self.walk), ("asked", self.ask), ("seen", self.see),
        )  # fmt: skip
        for kind, walk in ways:
            for one in request[kind]:
                if one["data"] in self.rows and one["model"] in self.built:
                    counts = self._tried(one["name"], partial(walk, one))
                    walks += [{"name": one["name"], **counts}] if counts else []
        return {"models": sizes, "trainings": trainings, "walks": walks, "failures": self.failures, "notes": self.notes}

    def _tried(self, name: str, work: Callable[[], Any]) -> Any:
        """The work's result; what goes wrong is one line of `failures`, and the rest goes on."""
        try:
            return work()
        except (UserError, Unfit) as error:
            self.failures.append(f"{name}: {error}")
        except Exception as error:  # torch raises many kinds on shapes that don't fit, each of them is the finding
            line = (str(error).strip().splitlines() or [""])[0]
            self.failures.append(f"{name}: {type(error).__name__}: {line}")
        return None

    # ── sizes

    def build(self, key: str, adapted: dict[str, Any] | None = None) -> Any:
        """The model of a key on the meta device; with adapters it is another one, which isn't kept."""
        if adapted or key not in self.built:
            wanted = self.request["models"][key]
            with META:
                model = models.build(wanted["spec"], Context.local(self.folder / "nothing", {"id": key}), image=wanted["image"])
                adapters.attach(model, adapted, 0)
            if adapted:
                return model
            self.built[key] = model
        return self.built[key]

    def sizes(self, key: str) -> dict[str, int]:
        """Parameters by part. Unfit where one lies on a real device."""
        model = self.build(key)
        real = [name for name, tensor in model.named_parameters() if tensor.device != META]
        if real:
            raise Unfit(f"{real[0]} is not hollow")
        return {row["part"]: row["parameters"] for row in models.freeze_table(model)}

    def training(self, training: dict[str, Any]) -> dict[str, Any]:
        """What each phase trains by part, and the largest weight; `learned`: parameters that any phase trains."""
        adapted = training.get("adapters")
        model = self.build(training["model"], adapted)
        phases, learned = [], set[int]()
        for parts in training["phases"]:
            models.train_parts(model, set(parts))
            adapters.freeze_rest(model)
            phases.append({row["part"]: row["trainable"] for row in models.freeze_table(model)})
            learned |= {id(p) for p in model.parameters() if p.requires_grad}
            empty = [part for part in parts if not phases[-1][part]]
            if empty:
                raise Unfit(f"{empty[0]} is to learn and has no parameters")
        total = sum(p.numel() for p in model.parameters())
        return {"phases": phases, "total": total, "learned": sum(p.numel() for p in model.parameters() if id(p) in learned)}

    # ── rows

    def make(self, id: str, spec: dict[str, Any]) -> None:
        """The rows of a data set's example, made by its own reader."""
        own = {key: value for key, value in spec.items() if key not in ("expect", "most_dropped", "name")}
        out, root = self.folder / id, self.folder / "data"
        if not examples.write(own, root):
            if own["source"] != "specimens":
                self.notes.append(f"no example of the layout of {own['source']!r}: {spec.get('name', id)} was not walked")
                return
            own["rows"] = examples.COUNT
        out.mkdir()
        manifest = sources.build(own, out, _none, str(root))
        if manifest["dropped"] or not manifest["rows"]:
            raise Unfit(f"rows of its example were dropped: {manifest['dropped']}")
        self.rows[id] = out

    def walk(self, walk: dict[str, Any]) -> dict[str, Any]:
        """Training rows: encoded, packed, through the model. Returns counts."""
        model, directory = self.built[walk["model"]], self.rows[walk["data"]]
        objective = load_objective(walk["objective"])
        encoding = Encoding.of(
            tokenizer=small_tokenizer(self.request["models"][walk["model"]]["spec"]), template=walk["template"], image=walk["image"],
            max_tokens=walk["max_tokens"], streams=dict(objective.streams),
        )  # fmt: skip
        task = TrainTask((str(directory),), encoding, 0, 1, MICRO_TOKENS)
        batches, stats = task(np.arange(len(open_rows(str(directory)))))
        if stats.dropped or stats.truncated or stats.unlearned:
            said = f"dropped {dict(stats.dropped)}, cut {stats.truncated}, nothing to learn {stats.unlearned}"
            raise Unfit(f"rows of its example don't pass: {said}")
        for batch in batches:
            self.forward(model, batch)
        return {"rows": stats.rows, "tokens": stats.tokens, "learned": stats.learned, "images": stats.images, "packs": len(batches)}

    def forward(self, model: Any, batch: Batch) -> None:
        """A micro-batch through the hollow model; Unfit where a shape isn't what its part promises."""
        streams = to_device(batch).streams
        if hasattr(model, "llm"):
            for pack in streams.values():
                self.text(model, pack)
            return
        with META:
            images, texts = streams["image"].images, streams["text"]
            assert isinstance(images, Tensor) and texts.ids is not None
            one = model.embed_images(images.to(META))
            other = model.embed_texts(dataclasses.replace(texts, ids=texts.ids.to(META)))
        _fits("image embeddings", one, (len(images), model.width))
        _fits("text embeddings", other, (texts.segments, model.width))

    def text(self, model: Any, pack: TensorPack) -> None:
        """Encoder, connector and language model over one pack. Positions are made on the host, as in training."""
        assert pack.ids is not None and pack.learned is not None
        if isinstance(pack.images, list):
            images: Any = [image.to(META) for image in pack.images]
        else:
            images = None if pack.images is None else pack.images.to(META)
        slots = None if pack.image_slots is None else pack.image_slots.to(META)
        there = dataclasses.replace(pack, ids=pack.ids.to(META), images=images, image_slots=slots)
        lengths, count = pack.lengths.tolist(), len(pack.ids)
        with torch.no_grad():
            embedded = model.embed(there)  # refuses as many image tokens as the text has places for
            _fits("embeddings", embedded, (count, model.width))
            positions = model.positions(pack).to(META)
            hidden = model._run(embedded[None], positions, attention.Segments(lengths, META))[0]
            _fits("hidden states", hidden, (count, model.width))
            _fits("logits", model.logits(hidden[: len(pack.learned)]), (len(pack.learned), model.vocabulary))

    def ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Questions: prompts, pixels, packs, the pass before the answer."""
        model, rows = self.built[asked["model"]], open_rows(str(self.rows[asked["data"]]))
        recipe = None if asked["image"] is None else recipe_from_json(asked["image"])
        tokenizer = small_tokenizer(self.request["models"][asked["model"]]["spec"])
        prompts = prepare(rows, tokenizer, asked["template"], recipe, asked["suffix"])
        if prompts.dropped:
            raise Unfit(f"questions of its example can't be asked: {dict(prompts.dropped)}")
        pixels, numbers = Pixels(rows, recipe), range(len(rows))
        packed = question_pack(prompts, [pixels.of(number) for number in numbers], list(numbers), recipe)
        tokens = int(prompts.lengths.sum())
        self.forward(model, Batch({"text": packed}, len(rows), 0))
        return {"rows": len(rows), "tokens": tokens, "learned": 0, "images": int(packed.image_counts.sum()), "packs": 1}

    def see(self, seen: dict[str, Any]) -> dict[str, Any]:
        """Labelled images through a CLIP's image tower."""
        model, directory = self.built[seen["model"]], str(self.rows[seen["data"]])
        batch, stats = ImageTask(directory, recipe_from_json(seen["image"]))(np.arange(len(open_rows(directory))))
        if stats.dropped:
            raise Unfit(f"images of its example can't be used: {dict(stats.dropped)}")
        with META:
            made = model.embed_images(torch.from_numpy(np.asarray(batch.images)).to(META))
        _fits("image embeddings", made, (len(batch.ids), model.width))
        return {"rows": len(batch.ids), "tokens": 0, "learned": 0, "images": len(batch.ids), "packs": 1}


def small_tokenizer(spec: dict[str, Any]) -> str:
    """The committed tokenizer of the same kind as the model's: byte-level BPE with ChatML's tokens for Qwen, byte fallback for the rest."""
    part = spec["parts"].get("llm") or spec["parts"]["encoder"]
    config = part["config"]
    named = spec.get("tokenizer") or config.get("tokenizer")
    if named in ("tiny-llama", "tiny-qwen2"):
        return named
    kind = str(config.get("model_type") or config.get("text_config", {}).get("model_type") or "")
    return "tiny-qwen2" if kind.startswith("qwen") else "tiny-llama"


def _fits(what: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise Unfit(f"{what} are {tuple(tensor.shape)}, {tuple(shape)} expected")


def _none(id: str) -> Path:
    raise UserError(f"{id} is made of other rows", why="only sources have examples")


def main() -> int:
    request = json.loads(sys.stdin.read() or "{}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(Hollow(request, Path(folder)).run()))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
