"""Image-label similarities from a contrastive model: labelled rows or an image folder in, a similarities artefact out.

    python -m trainers.mine --model ViT-L-14 --weights DIR|HUB_ID --rows DIR --template "an image of a {}" --out DIR
    python -m trainers.mine --model DIR --images FOLDER --labels NAMES.txt --out DIR       FOLDER/<label>/<image>; writes DIR/rows too
    python -m datasets_ray.choices build --similarities DIR --rows DIR/rows --k 5 --out QUESTIONS

--model is an open_clip architecture with --weights, or a directory: a trained clip part (model.json), an open_clip export
(open_clip_config.json), or a CLIP or SigLIP that transformers saved (config.json). Images are embedded by Ray actors that hold the model,
once: embeddings are cached under the hash of the image tower's weights, the image recipe and the rows, so that another template, another
list of labels or another k touches no image again.
Negatives must not come from a model under test (they would be harder for it than for others): name those with --arm-encoder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from datasets_ray.encoding import Stats
from datasets_ray.errors import Parser, UserError, run_command
from datasets_ray.files import given_object, json_object
from datasets_ray.images import CLIP_MEAN, CLIP_STD, recipe_from_json
from datasets_ray.pipeline import ImageTask
from datasets_ray.rows import RowTable, open_rows, row, write_rows
from trainers.context import Context
from trainers.loaded import identity, load_model

IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
STORE_BYTES = 256 << 20
"""Object store of a Ray that the command starts itself: vectors and row numbers pass through it, images don't."""


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────────────
def resolve(model: str, weights: str | None, revision: str | None = None) -> tuple[dict[str, Any], dict[str, Any], dict[str, Path]]:
    """(ModelSpec of family clip, ImageRecipe, inputs) of what the command line names."""
    folder = Path(model)
    if (folder / "model.json").is_file():
        spec = json_object(folder / "model.json")
        if spec.get("family") != "clip":
            raise UserError(f"{model} is of family {spec.get('family')!r}", why="similarities need a text tower", hint="a clip model")
        here = folder.resolve().name
        spec["parts"]["encoder"]["weights"] = {"stage": here, "part": "encoder"}
        return spec, _recipe(spec["parts"]["encoder"]["config"], {}), {here: folder}
    if (folder / "open_clip_config.json").is_file():
        exported = json_object(folder / "open_clip_config.json")
        if not isinstance(exported.get("model_cfg"), dict):
            raise UserError("open_clip_config.json has no model_cfg", why="it is not as open_clip saves it", where=str(folder))
        part = {"builder": "open_clip", "config": exported["model_cfg"], "weights": {"checkpoint": str(folder), "revision": None}}
        return {"family": "clip", "parts": {"encoder": part}}, _recipe(exported["model_cfg"], exported.get("preprocess_cfg", {})), {}
    if folder.is_dir():
        return _released(folder), released_recipe(folder), {}
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise UserError(f"open_clip has no model {model!r}", hint="an architecture such as ViT-L-14, or a directory")
    if weights is None:
        raise UserError(f"no weights for {model}", why="similarities of an untrained model say nothing", hint="--weights DIR or a hub id")
    part = {"builder": "open_clip", "config": {"name": model}, "weights": {"checkpoint": weights, "revision": revision}}
    return {"family": "clip", "parts": {"encoder": part}}, _recipe(config, {}), {}


def _released(folder: Path) -> dict[str, Any]:
    """ModelSpec of a CLIP or SigLIP that transformers saved. UserError for any other directory."""
    config = folder / "config.json"
    kind = json_object(config).get("model_type") if config.is_file() else None
    builder = {"clip": "open_clip", "siglip": "transformers_vision"}.get(str(kind))
    if builder is None:
        why = f"its config.json says {kind!r}" if kind else "it holds neither model.json, open_clip_config.json nor config.json"
        raise UserError(f"{folder} is no CLIP", why=why, hint="a trained clip part, an open_clip export, or transformers' CLIP or SigLIP")
    part = {"builder": builder, "config": {}, "weights": {"checkpoint": str(folder), "revision": None}}
    return {"family": "clip", "parts": {"encoder": part}}


def released_recipe(folder: Path) -> dict[str, Any]:
    """ImageRecipe of transformers' CLIP (shortest side, centre crop) or SigLIP (squashed), by config.json and preprocessor_config.json."""
    config, file = json_object(folder / "config.json"), folder / "preprocessor_config.json"
    vision = {"image_size": 224, "patch_size": 32 if config["model_type"] == "clip" else 16, **(config.get("vision_config") or {})}
    usual = (CLIP_MEAN, CLIP_STD, "crop") if config["model_type"] == "clip" else ((0.5,) * 3, (0.5,) * 3, "squash")
    said = json_object(file) if file.is_file() else {}
    mean, std = said.get("image_mean", usual[0]), said.get("image_std", usual[1])
    sizes = {"kind": "square", "size": vision["image_size"], "patch": vision["patch_size"], "fit": usual[2]}
    return {**sizes, "mean": list(mean), "std": list(std)}


def _recipe(config: dict[str, Any], preprocess: dict[str, Any]) -> dict[str, Any]:
    """open_clip's evaluation transform: shortest side, centre crop; its mean and std."""
    vision = config["vision_cfg"] if "name" not in config else _named(config["name"])["vision_cfg"]
    fit = {"shortest": "crop", "squash": "squash", "longest": "pad"}[preprocess.get("resize_mode", "shortest")]
    mean, std = preprocess.get("mean", CLIP_MEAN), preprocess.get("std", CLIP_STD)
    return {"kind": "square", "size": vision["image_size"], "patch": vision["patch_size"], "fit": fit, "mean": list(mean), "std": list(std)}


def _named(name: str) -> dict[str, Any]:
    import open_clip

    return open_clip.get_model_config(name)


def image_tower(model: Any) -> str:
    """Hash of the image tower's tensors: the same weights under another file name are the same model."""
    digest = hashlib.sha256()
    tower = model.clip.visual if hasattr(model, "clip") else model.siglip.vision_model
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.float().cpu().numpy()).data)
    return digest.hexdigest()[:24]


def refuse(arms: Sequence[str], spec: dict[str, Any], model: Any, ctx: Context) -> None:
    """UserError if the miner is one of the arms' encoders: by name and weights, or by the tensors where they are at hand."""
    part = spec["parts"]["encoder"]
    for arm in arms:
        name, _, weights = arm.partition(":")
        same = part["config"].get("name") == name and part["weights"].get("checkpoint") == (weights or None)
        if Path(arm).is_dir():
            theirs, image, inputs = resolve(arm, None)
            other = load_model(theirs, image, "fp32", Context.local(ctx.work, ctx.stage, inputs, device=ctx.device))
            same = image_tower(other) == image_tower(model)
        if same:
            raise UserError(
                f"the miner is the encoder of an arm: {arm}", why="its own mistakes would make the questions harder for that arm",
                hint="mine with a model that no arm sees through",
            )  # fmt: skip


# ── the images ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
def rows_of_folder(images: Path, out: Path) -> Path:
    """Labelled rows of `<images>/<label>/<file>`; underscores in folder names become spaces."""
    files = sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGE_FILES and p.parent != images)
    if not files:
        raise UserError(f"no images in {images}", why=f"looked for <label>/<image> with {', '.join(sorted(IMAGE_FILES))}")
    rows = []
    for file in files:
        place = file.relative_to(images)
        rows.append(row(place.as_posix(), images=[{"path": place.as_posix()}], label=place.parts[0].replace("_", " ")))
    write_rows(rows, out, classes=sorted({r["label"] for r in rows}), root=str(images.resolve()))
    return out


def content(rows: RowTable) -> list[Any]:
    """What the images are: the shards' digests, and for images that are files their sizes and times of change."""
    found: list[Any] = [shard["sha256"] for shard in rows.manifest["shards"]]
    if rows.root is not None:
        images = pc.list_flatten(rows.table.column("images"))  # bytes stay where they are
        own = pc.is_null(pc.struct_field(images, "bytes"))
        for path in pc.struct_field(images, "path").filter(own).to_pylist():
            if path and (rows.root / path).is_file():
                stat = (rows.root / path).stat()
                found.append([path, stat.st_size, stat.st_mtime_ns])
    return found


class MiningActor:
    """Holds the model; a batch of row numbers in, their ids, vectors and counts out (pickled: one value a batch)."""

    def __init__(
        self, spec: dict[str, Any], image: dict[str, Any], precision: str, inputs: dict[str, Path], rows: str, device: str
    ) -> None:  # fmt: skip
        from trainers.embeddings import Embedder
        from trainers.models import build

        ctx = Context({"id": "mine", "spec": {}}, Path(), Path(), lambda name: inputs[name], device=device)
        self.task = ImageTask(rows, recipe_from_json(image))
        self.embedder = Embedder(build(spec, ctx, image=image, precision=precision).to(device), device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"made": [pickle.dumps(self.embed(np.asarray(numbers))) for numbers in batch["numbers"]]}

    def embed(self, numbers: np.ndarray) -> tuple[list[str], np.ndarray | None, Stats]:
        made, stats = self.task(numbers)
        return made.ids, self.embedder(made) if made.ids else None, stats


def embed(arguments: tuple[Any, ...], rows: RowTable, batch: int, actors: int, gpus: float) -> tuple[list[tuple[list[str], Any]], Stats]:
    """All rows' vectors in order. actors: how many processes hold the model; 0: this one does, without Ray."""
    steps = [np.arange(start, min(start + batch, len(rows))) for start in range(0, len(rows), batch)]
    if actors == 0:
        actor = MiningActor(*arguments)
        made = [actor.embed(numbers) for numbers in steps]
    else:
        import ray

        started = not ray.is_initialized()
        if started:
            # a cluster is joined as it is; a Ray of our own has a core for each actor and nothing else to start
            own: dict[str, Any] = {"num_cpus": actors, "object_store_memory": STORE_BYTES, "include_dashboard": False}
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **({} if os.environ.get("RAY_ADDRESS") else own))
        try:
            import ray.data

            logging.getLogger("ray.data").setLevel(logging.WARNING)
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.execution_options.preserve_order = True
            dataset = ray.data.from_items([{"numbers": numbers.tolist()} for numbers in steps], override_num_blocks=len(steps)).map_batches(
                MiningActor, fn_constructor_args=arguments, batch_size=1, compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=1, num_gpus=gpus or None,
            )  # fmt: skip
            made = [pickle.loads(item["made"]) for item in dataset.iter_rows()]
        finally:
            if started:
                ray.shutdown()
    total = Stats()
    for _, _, stats in made:
        total.add(stats)
    return [(ids, vectors) for ids, vectors, _ in made if ids], total


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def labels_of(path: str | None, rows: RowTable) -> list[str]:
    """Class names: a JSON list or a line each; without a file the rows' own classes."""
    if path is None:
        return rows.manifest["classes"] or sorted({label for label in rows.column("label") if label})
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        names = json.loads(text) if text.lstrip().startswith("[") else [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path} can't be read", why=why, hint="a JSON list of names, or one name a line") from None
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} holds no class names", why="a JSON list of strings or one name a line")
    return names


def mine(options: argparse.Namespace) -> dict[str, Any]:
    """Embeds (or finds) the images, embeds the class texts, writes the similarities; returns what was done."""
    from trainers import embeddings, similarities

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    spec, image, inputs = resolve(options.model, options.weights, options.revision)
    if options.recipe:
        image = given_object(options.recipe, "--recipe")
    ctx = Context({"id": "mine", "spec": {}}, out, out / "work", lambda name: inputs[name], device=options.device)
    model = load_model(spec, image, options.precision, ctx)
    refuse(options.arm_encoder, spec, model, ctx)
    directory = Path(options.rows) if options.rows else rows_of_folder(Path(options.images), out / "rows")
    rows = open_rows(str(directory.resolve()))

    key = identity([image_tower(model), image, options.precision, content(rows)])
    kept = Path(options.cache or out / "embeddings") / key
    reused = (kept / "manifest.json").is_file()
    if not reused:
        arguments = (spec, image, options.precision, inputs, str(directory.resolve()), options.device)
        found, stats = embed(arguments, rows, options.batch, options.actors, 1.0 if options.device.startswith("cuda") else 0.0)
        partial = kept.with_name(f"{key}.{os.getpid()}.tmp")
        partial.mkdir(parents=True)
        embeddings.write(found, stats, partial, name=embeddings.model_name(spec), image=image, precision=options.precision)
        shutil.rmtree(kept, ignore_errors=True)
        partial.rename(kept)
    made = json.loads((kept / "manifest.json").read_text())
    classes = labels_of(options.labels, rows)
    texts, cut = similarities.class_embeddings(model, classes, options.template, options.device)
    matrix = np.load(kept / "embeddings.npy") @ texts.T
    facts = {"template": options.template, "model": embeddings.model_name(spec), "truncated": cut}
    summary = similarities.write(matrix, out, ids=made["ids"], classes=classes, **facts)
    return {**summary, "dropped": made["dropped"], "embeddings": "reused" if reused else "made", "embeddings_at": str(kept)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m trainers.mine", description="Image-label similarities with an open_clip model.")
    parser.add_argument(
        "--model", required=True, help="an open_clip architecture, or a directory with model.json, open_clip_config.json or config.json"
    )
    parser.add_argument("--weights", help="directory or hub id of the architecture's weights")
    parser.add_argument("--revision", help="revision of the hub id")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--rows", help="a rows artefact of labelled images")
    where.add_argument("--images", help="a folder of folders: <label>/<image>")
    parser.add_argument("--labels", help="class names, a line each or a JSON list (default: the rows' own)")
    parser.add_argument("--template", default="a photo of a {}", help="what is said of a class (FOCI: 'an image of a {}')")
    parser.add_argument("--recipe", help="ImageRecipe as JSON or a file (default: open_clip's evaluation transform in the model's size)")
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--cache", help="where embeddings are kept (default: OUT/embeddings)")
    parser.add_argument("--arm-encoder", action="append", default=[], help="NAME:WEIGHTS or directory of an encoder under test; repeatable")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--actors", type=int, default=1, help="Ray actors that hold the model; 0: none, in this process")
    parser.add_argument("--device", default="cpu")
    print(json.dumps(mine(parser.parse_args(arguments)), sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
