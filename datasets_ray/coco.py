"""Source `coco`: captions of COCO 2017 (Lin et al., ECCV 2014; Chen et al. 2015).

Flows in: the official layout, `annotations/captions_{train,val}2017.json` and `{train,val}2017/<file>.jpg`. Flows out: caption rows, in
the annotation file's order: one per caption, or with "per_image": true one per image with a seeded caption. Images are paths below the
dataset's folder; those missing or undecodable are left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.errors import UserError
from datasets_ray.images import verdict
from datasets_ray.photos import check_spec, dataset_folder
from datasets_ray.rows import IMAGE, row
from datasets_ray.shards import Made, write_sharded

USUAL = ("coco2017_tiny", "coco2017", "coco")


class Maker:
    """Caption rows of a range of (image path, caption) pairs; picklable."""

    def __init__(self, pairs: list[tuple[str, str]], root: Path, split: str) -> None:
        self.pairs, self.root, self.split = pairs, root, split

    def __call__(self, start: int, stop: int) -> Made:
        made = Made([])
        for index, (path, told) in enumerate(self.pairs[start:stop], start):
            if reason := verdict({"path": path}, self.root):
                made.dropped.append((path, reason))
                continue
            messages = [{"role": "user", "text": IMAGE}, {"role": "assistant", "text": told}]
            made.rows.append(row(f"coco-{self.split}-{index:06d}", images=[{"path": path}], messages=messages, meta={"file": path}))
        return made


def read(root: Path, split: str, per_image: bool, seed: int) -> list[tuple[str, str]]:
    """(image path below `root`, caption) in file order."""
    file = root / "annotations" / f"captions_{split}2017.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in data["images"]}
        told = [(f"{split}2017/{names[a['image_id']]}", " ".join(a["caption"].split())) for a in data["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a COCO captions file", why=f"{type(error).__name__}: {error}") from None
    if not per_image:
        return told
    grouped: dict[str, list[str]] = {}
    for path, text in told:
        grouped.setdefault(path, []).append(text)
    return [(p, texts[int(np.random.default_rng([seed, i]).integers(len(texts)))]) for i, (p, texts) in enumerate(grouped.items())]


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    full = check_spec({"part": "captions", **spec}, ("captions",), ("train", "val"), ["per_image"])
    split = full["split"]
    root = dataset_folder(full, data_root, USUAL, [f"annotations/captions_{split}2017.json", f"{split}2017"])
    pairs = read(root, split, bool(full.get("per_image", False)), full["seed"])[: full["rows"]]
    return write_sharded(len(pairs), Maker(pairs, root, split), Path(out), root=str(root), part="captions")
