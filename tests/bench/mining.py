"""Mining again: what a second template and another k cost, over the first pass of `trainers.mine` on the same photographs.

A CLIP of our own (vision 6 x 192 at 224 px, far smaller than a real miner, so that everything around it weighs more) reads real photographs
(FINEGRID_DATA) once; then the command runs with another template, and `datasets_ray.choices` with another k. Each is timed whole, model
loading included, in one process without Ray's actors; every repetition has a cache of its own.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from pathlib import Path

from tests.bench.figure import Figure, NotHere, ratios
from tests.bench.side import Side
from tests.conftest import find_data

PHOTOGRAPHS = 192
CLASSES = "food101_first10"
CLIP = {
    "embed_dim": 64, "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}  # fmt: skip


class Miner:
    def __init__(self, folder: str) -> None:
        import torch

        from datasets_ray.rows import row, write_rows
        from tests.small_world import open_clip

        torch.set_num_threads(1)
        self.folder, root = Path(folder), (find_data() or Path()) / CLASSES
        open_clip(self.folder / "clip", CLIP)
        photos = sorted(root.rglob("*.jpg"))[:PHOTOGRAPHS]
        named = [(str(p.relative_to(root)), p.parent.name.replace("_", " ")) for p in photos]
        rows = [row(path, images=[{"path": path}], label=label) for path, label in named]
        write_rows(rows, self.folder / "rows", classes=sorted({label for _, label in named}), root=str(root))

    def mine(self, cache: str, template: str) -> float:
        from trainers import mine

        begin = time.perf_counter()
        given = ["--model", str(self.folder / "clip"), "--rows", str(self.folder / "rows"), "--actors", "0", "--template", template]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            mine.main([*given, "--cache", str(self.folder / cache), "--out", str(self.folder / f"{cache}-similarities")])
        expected = "made" if template == "a photo of a {}" else "reused"
        assert f'"embeddings": "{expected}"' in said.getvalue(), said.getvalue()
        return time.perf_counter() - begin

    def choose(self, cache: str, k: int) -> float:
        from datasets_ray.choices import build_from_similarities

        begin = time.perf_counter()
        found = self.folder / f"{cache}-similarities"
        build_from_similarities(found, self.folder / "rows", self.folder / f"{cache}-{k}", k=k, seed=0)
        return time.perf_counter() - begin


def measure(repeats: int) -> list[Figure]:
    if not ((find_data() or Path("/nowhere")) / CLASSES).is_dir():
        raise NotHere("no photographs here: set FINEGRID_DATA")
    first, second, other = [], [], []
    with tempfile.TemporaryDirectory() as folder, Side("tests.bench.mining:Miner", folder=folder) as miner:
        for turn in range(-1, repeats):  # the first turn is the warm-up
            took = [miner.ask("mine", f"cache-{turn}", template) for template in ("a photo of a {}", "an image of a {}")]
            took += [miner.ask("choose", f"cache-{turn}", k) for k in (5, 4)][1:]
            for values, seconds in zip((first, second, other), took):
                values.extend([seconds] if turn >= 0 else [])
    return [
        Figure("mining: first pass", "s", first, note=f"{PHOTOGRAPHS} photographs, one thread"),
        Figure("mining: second template / first pass", "", ratios(second, first), 0.05),
        Figure("mining: another k / first pass", "", ratios(other, first), 0.05),
    ]
