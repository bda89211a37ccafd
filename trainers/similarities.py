"""Stage `similarities`: image embeddings and class names in, cosines out. No image is read.

In: `{"embeddings": id, "model": ModelSpec (family clip), "rows": id, "template": "a photo of a {}"}`; `template` may be a list, or
`{"ensemble": NAME}`, CLIP's own texts for a data set (`datasets_ray.clip_templates`).
Out: `similarities.npy` float32[N, C] and `manifest.json` (ids, classes, template, model).

Each class name is written into the template, embedded and L2-normalised; several templates are averaged and normalised again
(CLIP: Radford et al. 2021, section 3.1.4; CLIP_benchmark `zeroshot_classification.py`). Cosines are computed in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from datasets_ray.clip_templates import ensemble
from datasets_ray.errors import UserError
from datasets_ray.packing import Batch, Segment, pack
from datasets_ray.prompts import Piece, Rendered, RowError
from datasets_ray.rows import open_rows
from datasets_ray.tokens import encode_many, load_tokenizer
from trainers.batch import to_device
from trainers.context import Context
from trainers.embeddings import model_name
from trainers.loaded import load_model

TEXTS = 256
"""Class names embedded at a time."""


def run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    folder = ctx.inputs(spec["embeddings"])
    made = json.loads((folder / "manifest.json").read_text())
    rows = open_rows(str(ctx.inputs(spec["rows"])))
    classes = rows.manifest["classes"] or sorted(set(rows.column("label")))
    model = load_model(spec["model"], made["image"], made["precision"], ctx)
    with ctx.working():
        given = spec["template"]
        template = ensemble(given["ensemble"], ctx.data_root) if isinstance(given, dict) else given
        texts, cut = class_embeddings(model, classes, template, ctx.device)
        matrix = np.load(folder / "embeddings.npy") @ texts.T
    facts = {"template": template, "model": model_name(spec["model"]), "truncated": cut}
    return write(matrix, ctx.out, ids=made["ids"], classes=classes, **facts)


def write(matrix: np.ndarray, out: Path, **facts: Any) -> dict[str, Any]:
    np.save(Path(out) / "similarities.npy", np.ascontiguousarray(matrix, dtype=np.float32))
    (Path(out) / "manifest.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
    return {"rows": len(facts["ids"]), "classes": len(facts["classes"]), **{k: facts[k] for k in ("template", "model", "truncated")}}


def filled(template: str | Sequence[str], classes: Sequence[str]) -> list[list[str]]:
    """For every template its texts, a class each. UserError for a template without `{}` (or `{c}`, as CLIP_benchmark writes it)."""
    templates = [template] if isinstance(template, str) else list(template)
    for one in templates:
        if "{}" not in one and "{c}" not in one:
            raise UserError(f"template {one!r} has no place for the class name", hint="a photo of a {}")
    return [[one.replace("{c}", name).replace("{}", name) for name in classes] for one in templates]


@torch.no_grad()
def class_embeddings(model: Any, classes: Sequence[str], template: str | Sequence[str], device: str) -> tuple[np.ndarray, int]:
    """float32[C, E], unit length, and how many texts were cut at the text tower's length."""
    total: np.ndarray | None = None
    cut = 0
    texts = filled(template, classes)
    for named in texts:
        vectors = []
        for start in range(0, len(named), TEXTS):
            ready, short = _tokenise(model, named[start : start + TEXTS], device)
            vectors.append(model.embed_texts(ready).float())
            cut += short
        one = F.normalize(torch.cat(vectors), dim=-1).cpu().numpy()
        total = one if total is None else total + one
    assert total is not None
    return (total / np.linalg.norm(total, axis=1, keepdims=True)).astype(np.float32), cut


def _tokenise(model: Any, texts: Sequence[str], device: str) -> tuple[Any, int]:
    """Texts as the tower was trained to read them: text and end token, packed; or padded by open_clip's or the model's own tokenizer."""
    if hasattr(model, "tokenize"):
        return model.tokenize(texts, device)
    if model.tokenizer is None:
        import open_clip

        tokenize = open_clip.get_tokenizer(model.config.get("name", "ViT-B-32"), context_length=model.context_length)
        ids = tokenize(list(texts))
        return ids.to(device), int((ids[:, -1] != 0).sum())
    tokenizer = load_tokenizer(model.tokenizer)
    end = tokenizer.eos_token or ""
    rendered = [Rendered((Piece(text, False), Piece(end, False))) for text in texts]
    encoded = encode_many(rendered, tokenizer, [[]] * len(texts), model.context_length, keep_end=True)
    segments = []
    for text, one in zip(texts, encoded):
        if isinstance(one, RowError):
            raise UserError(f"class text {text!r} can't be tokenised", why=one.reason)
        segments.append(Segment(one.ids, one.labels, (), np.zeros((0, 3), dtype=np.int64), len(one.ids)))
    batch = Batch({"text": pack(segments, range(len(segments)), (0, 0))}, len(segments), 0)
    return to_device(batch, device).streams["text"], sum(one.truncated for one in encoded if not isinstance(one, RowError))
