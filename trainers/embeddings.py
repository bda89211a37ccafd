"""Stage `embeddings`: labelled rows and a contrastive model in, one unit vector per image out.

In: `{"model": ModelSpec (family clip), "rows": id, "image": ImageRecipe, "precision"}`.
Out: `embeddings.npy` float32[N, E], L2-normalised, and `manifest.json` (ids in the same order, what was dropped and why).

Images are embedded once: another template, another k or another set of class names starts from this artefact. `trainers.mine` runs the same
`Embedder` on Ray actors; inside a lane, which already holds the device, it runs here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets_ray.encoding import Stats
from datasets_ray.errors import UserError
from datasets_ray.images import recipe_from_json
from datasets_ray.pipeline import ImageBatch, ImageTask, image_batches
from datasets_ray.rows import open_rows
from trainers.context import Context
from trainers.loaded import load_model

BATCH = 256
STREAMED_ROWS = 8192
"""Larger sets are decoded by Ray Data where it runs; for smaller ones its start-up costs more than the decoding."""
DROPPED_SHARE = 0.01


class Embedder:
    """model.embed_images over batches; call it with an ImageBatch."""

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.device = model, device

    @torch.no_grad()
    def __call__(self, batch: ImageBatch) -> np.ndarray:
        """float32[N, E], unit length."""
        assert isinstance(batch.images, np.ndarray), "a CLIP reads images of one size"
        images = torch.from_numpy(batch.images).to(self.device)
        return self.model.embed_images(images).float().cpu().numpy()


def run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    directory = ctx.inputs(spec["rows"])
    embedder = Embedder(load_model(spec["model"], spec["image"], spec["precision"], ctx), ctx.device)
    with ctx.working():
        batches, stats = decoded(directory, spec["image"], int(ctx.runtime.get("eval_batch", BATCH)))
        found = [(batch.ids, embedder(batch)) for batch in batches]
    return write(found, stats, ctx.out, name=model_name(spec["model"]), image=spec["image"], precision=spec["precision"])


def decoded(directory: Path, image: dict[str, Any], batch: int) -> tuple[Iterable[ImageBatch], Stats]:
    """The rows' images in order, and the counts, which are complete when the batches have been read."""
    recipe = recipe_from_json(image)
    rows = len(open_rows(str(directory)))
    if rows > STREAMED_ROWS:
        stream = image_batches(directory, recipe, batch)
        return stream, stream.stats
    stats, task = Stats(), ImageTask(str(directory), recipe)

    def here() -> Iterable[ImageBatch]:
        for start in range(0, rows, batch):
            made, counted = task(np.arange(start, min(start + batch, rows)))
            stats.add(counted)
            yield made

    return here(), stats


def write(found: list[tuple[list[str], np.ndarray]], stats: Stats, out: Path, **facts: Any) -> dict[str, Any]:
    """Writes the artefact; UserError when too many images can't be read."""
    stats.check(DROPPED_SHARE)
    ids = [id for batch, _ in found for id in batch]
    if not ids:
        raise UserError("no image to embed", why=f"{stats.rows} rows, dropped: {dict(stats.dropped)}")
    vectors = np.concatenate([vectors for batch, vectors in found if batch]).astype(np.float32)
    np.save(Path(out) / "embeddings.npy", vectors)
    manifest = {"ids": ids, "dropped": dict(stats.dropped), "width": vectors.shape[1], **facts}
    (Path(out) / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    return {"rows": len(ids), "width": int(vectors.shape[1]), "dropped": dict(stats.dropped), "model": facts.get("name")}


def model_name(model: dict[str, Any]) -> str:
    """What people call a clip ModelSpec: its architecture (or its size) and where its weights come from."""
    part = model["parts"]["encoder"]
    config, weights = part["config"], part["weights"]
    vision = config.get("vision_cfg", {})
    shape = config.get("name") or f"ViT {vision.get('layers')}x{vision.get('width')} patch {vision.get('patch_size')}"
    origin = weights.get("checkpoint") or weights.get("stage") or f"fresh {weights.get('fresh')}"
    return f"{shape} ({origin})" if vision or "name" in config else str(origin)
