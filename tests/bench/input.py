"""Training input: from JPEG files and captions to packed batches, ours on Ray Data against torch's `DataLoader` with 2 workers.

Equal are the files (real photographs as released, of 300 to 640 pixels; FINEGRID_DATA), their order, 16 rows a batch, and every pixel at
336 x 336, which is compared by digest before anything is timed. The peer reads, decodes and fits with the same PIL calls but without our
checks, tokenises each caption, pads to the longest and stacks images into shared memory (`default_collate`), in its workers.

*First pass*: nobody has read these photographs (a comment in each file makes them new for every repetition; pixels stay). *Later pass*:
the next arm reads them with another tokenizer; our pixels are kept then (`datasets_ray.pixels_cache`), and as in a run a thread of the
consumer makes the first steps, which with kept pixels are all that are measured here: so the later pass is measured again with nothing but
Ray Data. Rates are over the last three quarters of a pass, when both run full: starting up is hidden behind the model's loading in
training, and shown apart. A pass is 1,536 rows, three seconds (768 until 2026-11-21, when a second of it was Ray Data's beginning and
end; a stage reads tens of thousands). Rows a core: the same work in a plain loop, over its CPU time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.images import recipe_from_json
from datasets_ray.rows import open_rows, row, write_rows
from datasets_ray.streaming import HEAD_BYTES
from tests.bench.figure import Figure, NotHere, ratios
from tests.bench.side import Side
from tests.conftest import find_data

ROWS, BATCH, ALONE = 1536, 16, 192
RECIPE = {"kind": "square", "size": 336, "patch": 14, "fit": "crop"}
IMAGE_TOKENS = 576
SMALLEST = 257
"""Longer sides are of photographs as released; the others were made smaller."""
FIRST, LATER = "tiny-llama", "tiny-qwen2"
"""Tokenizers of the arm that comes first and of one that comes later."""
MICRO_TOKENS = 16384
STORE = 400 << 20


def photographs() -> list[bytes]:
    from PIL import Image

    data = find_data()
    found = [p for p in sorted(data.rglob("*.jpg")) if max(Image.open(p).size) >= SMALLEST] if data else []
    if not found:
        raise NotHere("no photographs here: set FINEGRID_DATA")
    return [path.read_bytes() for path in found]


def captions() -> list[str]:
    file = (find_data() or Path()) / "coco2017_tiny" / "annotations" / "captions_train2017.json"
    return [entry["caption"].strip() for entry in json.loads(file.read_text())["annotations"]]


def write_set(folder: Path, count: int, number: int) -> Path:
    """A rows artefact of `count` captioned photographs in files of their own; `number` is in each as a comment."""
    shown, said = photographs(), captions()
    (folder / "images").mkdir(parents=True)
    rows = []
    for at in range(count):
        comment = f"{number}-{at}".encode()
        jpeg = shown[at % len(shown)]
        name = f"{at:05d}.jpg"
        marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        (folder / "images" / name).write_bytes(jpeg[:2] + marker + jpeg[2:])
        messages = [{"role": "user", "text": "<image>"}, {"role": "assistant", "text": said[at % len(said)]}]
        rows.append(row(f"{number}-{at}", images=[{"path": name}], messages=messages))
    write_rows(rows, folder / "rows", root=str(folder / "images"))
    return folder / "rows"


def order_of(rows: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(rows)


def watched(batches: Iterable[tuple[int, np.ndarray]], digests: bool) -> dict[str, Any]:
    """Reads (rows, images) to the end: seconds to the first batch, rows a second from the first quarter to the last
    batch, and digests of the images."""
    begin, seen, mark, found = time.perf_counter(), 0, (0.0, 0), []
    first = last = 0.0
    for count, images in batches:
        first = first or time.perf_counter() - begin
        if digests:
            found.append(hashlib.sha256(np.ascontiguousarray(images).data).hexdigest())
        seen, last = seen + count, time.perf_counter()
        if not mark[1] and seen >= ROWS // 4:
            mark = last, seen
    return {"rows": seen, "first": first, "rate": (seen - mark[1]) / (last - mark[0]), "digests": found}


class Ours:
    """`datasets_ray.pipeline.train_batches` under a Ray like a run's."""

    def __init__(self, pixels: str) -> None:
        from datasets_ray.pixels_cache import PixelStore
        from grid.settings import Settings

        settings = Settings()
        self.store = PixelStore(settings.pixels_mb << 20, pixels)
        os.environ.update(settings.environment(1, settings.ray_cpus()))
        import logging

        import ray

        ray.init(
            address="local", num_cpus=settings.ray_cpus(), object_store_memory=STORE, include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR,
        )  # fmt: skip

    def close(self) -> None:
        import ray

        ray.shutdown()

    @staticmethod
    def encoding(tokenizer: str) -> Any:
        from datasets_ray.encoding import Encoding

        return Encoding.of(tokenizer=tokenizer, template="plain", image=RECIPE, max_tokens=2048, streams={"text": "conversation"})

    def read(self, rows: str, tokenizer: str, digests: bool = False, head: bool = True) -> dict[str, Any]:
        """head: whether a thread here makes the first steps."""
        from datasets_ray import streaming
        from datasets_ray.order import StepIndex
        from datasets_ray.pipeline import train_batches

        streaming.HEAD_BYTES = HEAD_BYTES if head else 0
        index = StepIndex(order_of(ROWS), BATCH)
        with train_batches([rows], self.encoding(tokenizer), index, micro_tokens=MICRO_TOKENS, name="bench", store=self.store) as stream:
            seen = watched(
                ((len(b.streams["text"].lengths), np.asarray(b.streams["text"].images)) for step in stream for b in step), digests
            )
            return {**seen, "pixels": stream.pixels.to_json() if stream.pixels else {}}

    def empty(self) -> int:
        """Gives the disk back what kept pixels take, open as they are in the data workers; how many files."""
        files = list(self.store.root.glob("*/pixels-*"))
        for file in files:
            os.truncate(file, 0)
        return len(files)

    def alone(self, rows: str, turn: int) -> float:
        """Rows a second of CPU time, in this process, of rows that nobody has read."""
        from datasets_ray.pipeline import TrainTask

        task = TrainTask((rows,), self.encoding(FIRST), 0, 1, MICRO_TOKENS)
        task(np.arange(BATCH))  # opens the table and the tokenizer
        begin = time.process_time()
        start = BATCH + turn * ALONE
        for at in range(start, start + ALONE, BATCH):
            task(np.arange(at, at + BATCH))
        return ALONE / (time.process_time() - begin)


class Captioned:
    """The peer's map-style data set."""

    def __init__(self, rows: str, tokenizer: str) -> None:
        from datasets_ray.tokens import load_tokenizer

        table = open_rows(rows)
        assert table.root is not None
        self.paths = [str(table.root / images[0]["path"]) for images in table.column("images")]
        self.texts = [messages[1]["text"] for messages in table.column("messages")]
        self.tokenizer, self.recipe = load_tokenizer(tokenizer), recipe_from_json(RECIPE)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: int) -> tuple[list[int], Any]:
        import torch
        from PIL import Image

        with Image.open(self.paths[at]) as opened:
            pixels = torch.from_numpy(np.array(self.recipe.fit(opened.convert("RGB"))))
        return self.tokenizer(self.texts[at] + "\n")["input_ids"], pixels


def collate(rows: list[tuple[list[int], Any]]) -> dict[str, Any]:
    import torch

    longest = IMAGE_TOKENS + max(len(ids) for ids, _ in rows)
    made = {"input_ids": torch.zeros(len(rows), longest, dtype=torch.long), "labels": torch.full((len(rows), longest), -100)}
    made["attention_mask"] = torch.zeros_like(made["input_ids"])
    for at, (ids, _) in enumerate(rows):
        end = IMAGE_TOKENS + len(ids)
        made["input_ids"][at, :IMAGE_TOKENS] = 5
        made["input_ids"][at, IMAGE_TOKENS:end] = made["labels"][at, IMAGE_TOKENS:end] = torch.tensor(ids)
        made["attention_mask"][at, :end] = 1
    return {**made, "pixels": torch.utils.data.default_collate([pixels for _, pixels in rows])}


class Peer:
    """torch's DataLoader."""

    def read(self, rows: str, tokenizer: str, digests: bool = False) -> dict[str, Any]:
        from torch.utils.data import DataLoader

        data: Any = Captioned(rows, tokenizer)
        order: Any = order_of(ROWS).tolist()
        loader = DataLoader(data, batch_size=BATCH, sampler=order, num_workers=2, collate_fn=collate, prefetch_factor=4)
        return watched(((len(batch["pixels"]), batch["pixels"].numpy()) for batch in loader), digests)


def measure(repeats: int) -> list[Figure]:
    with (
        tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as kept,
        Side("tests.bench.input:Ours", pixels=kept) as ours, Side("tests.bench.input:Peer") as peer,
    ):  # fmt: skip
        sets = [str(write_set(Path(folder) / str(number), ROWS, number)) for number in range(repeats + 1)]
        spare = str(write_set(Path(folder) / "alone", BATCH + repeats * ALONE, -1))
        sides = {"ours": ours, "peer": peer}
        # the warm-up: by Ray Data alone, so that its processes run
        shown = {"ours": ours.ask("read", sets[0], FIRST, True, False), "peer": peer.ask("read", sets[0], FIRST, True)}
        assert shown["ours"]["digests"] == shown["peer"]["digests"] and shown["ours"]["rows"] == ROWS, "other pixels"
        again = ours.ask("read", sets[0], LATER, True, False)
        if again["pixels"]["found"] != ROWS:
            raise NotHere(f"no room for kept pixels: {again['pixels']} (an eighth of a disk stays free)")
        assert again["digests"] == shown["peer"]["digests"], "kept pixels aren't the pixels"
        found: dict[tuple[str, str], list[dict[str, Any]]] = {(name, arm): [] for name in sides for arm in (FIRST, LATER)}
        through_ray = []
        for turn, rows in enumerate(sets[1:]):
            for arm in (FIRST, LATER):
                for name in list(sides)[:: -1 if turn % 2 else 1]:
                    found[name, arm].append(sides[name].ask("read", rows, arm))
            again = ours.ask("read", rows, LATER, False, False)
            assert again["pixels"]["found"] == ROWS, "no room on this disk for kept pixels"
            through_ray.append(again["rate"])
            ours.ask("empty")
        alone = [ours.ask("alone", spare, turn) for turn in range(repeats)]
    rate = {key: [one["rate"] for one in passes] for key, passes in found.items()}
    starts = [float(np.median([one["first"] for one in found[name, FIRST]])) for name in sides]
    about = f"{ROWS} rows, {len(photographs())} photographs, 336 px"
    return [
        Figure("input: ours, first pass", "rows/s", rate["ours", FIRST], note=f"{about}; first batch after {starts[0]:.2f} s"),
        Figure("input: DataLoader, 2 workers", "rows/s", rate["peer", FIRST], note=f"equal pixels; first batch after {starts[1]:.2f} s"),
        Figure("input: first pass, ours / DataLoader", "x", ratios(rate["ours", FIRST], rate["peer", FIRST]), 0.9, "higher"),
        Figure("input: later pass by another arm, ours / DataLoader", "x", ratios(rate["ours", LATER], rate["peer", LATER]), 3.0, "higher"),
        Figure("input: the same by Ray Data alone", "x", ratios(through_ray, rate["peer", LATER]), note="no thread of the consumer helps"),
        Figure("input: rows a core, JPEG decode included", "rows/s", alone, 100.0, "higher", "plain loop, over its CPU time"),
    ]
