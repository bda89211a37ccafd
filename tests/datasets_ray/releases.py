"""Small releases in their published layouts, and images broken in the ways that real copies are."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from datasets_ray.rows import RowTable
from datasets_ray.sources import build

CAPTION = "Render a clear and concise summary of the photo."


def make(spec: dict, root: Path, out: Path) -> tuple[dict, list[dict]]:
    """The manifest as it lies on disk, and the rows."""
    returned = build(spec, out, lambda _: out, str(root))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest.items() <= returned.items()
    return manifest, list(RowTable(out))


def picture(seed: int = 0, size: tuple[int, int] = (12, 8), mode: str = "RGB", format: str = "JPEG", **more) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **more)
    return file.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def captioned(id: str, path: str, text: str = "a small red flower") -> dict:
    return {"id": id, "image": path, "conversations": turns(f"{CAPTION}\n<image>", text)}


def llava_list(root: Path, records: list[dict], name: str = "LLaVA-Pretrain/list.json") -> Path:
    return put(root / name, json.dumps(records).encode())


def claimed_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims this size."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def animated() -> bytes:
    frames = [Image.new("P", (9, 7), color) for color in (3, 200, 90)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def turned() -> bytes:
    """A JPEG that EXIF says to turn by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(size=(12, 8), exif=exif)


def deep() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(70, dtype=np.uint16).reshape(7, 10) * 900).save(file, "PNG")
    return file.getvalue()


FINE: dict[str, bytes] = {
    "plain.jpg": picture(), "one.png": picture(size=(1, 1), format="PNG"), "cmyk.jpg": picture(mode="CMYK"), "deep.png": deep(),
    "palette.png": picture(mode="P", format="PNG", transparency=3), "alpha.webp": picture(mode="RGBA", format="WEBP"),
    "grey.jpg": picture(mode="L"), "animated.gif": animated(), "turned.jpg": turned(), "png_inside.jpg": picture(format="PNG"),
}
BROKEN: dict[str, tuple[bytes, str]] = {
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "image is a web page"),
    "cut.jpg": (picture(size=(64, 64))[:-900], "image cut short"),
    "cut.png": (picture(size=(64, 64), format="PNG")[:-3000], "image cut short"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "image is a git-LFS pointer"),
    "annexed.jpg": (b"/annex/objects/SHA256E-s8123--0a1b2c.jpg\n", "image is a git-annex pointer"),
    "empty.jpg": (b"", "image is empty"),
    "words.jpg": (b"this was never an image", "image unreadable"),
    "huge.png": (claimed_png(50_000, 50_000), "image too large"),
    "narrow.png": (picture(size=(1, 300), format="PNG"), "image too narrow"),
}  # fmt: skip


def parquet(path: Path, table: pa.Table, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **more)
    return path


def pixmo_table(urls: list[str], captions: list[str | None] | None = None) -> pa.Table:
    told = captions if captions is not None else [f"a long caption of {k}" for k in range(len(urls))]
    return pa.table({"image_url": urls, "caption": told, "transcripts": [["spoken words"]] * len(urls)})


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def saved(folder: Path, tables: list[pa.Table]) -> Path:
    """What `Dataset.save_to_disk` leaves: Arrow streams, state.json, dataset_info.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{k:05d}-of-{len(tables):05d}.arrow" for k in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder
