"""Source `pixmo`: PixMo-Cap (Deitke et al. 2024, "Molmo and PixMo", arXiv 2409.17146) with the images that `datasets_ray.download` fetched.

Flows in: the release's Parquet files (`image_url`, `caption`, `transcripts`) and the downloader's folder. Flows out: caption rows, in file
order; the caption is the `caption` column alone, as in the study. Spec:

    files    the Parquet files: a folder or a pattern, below the data root (pixmo-cap/data)
    images   the downloader's folder, below the data root (pixmo-cap/images)
    part     caption
    verify, rows   as in `llava_json`

Rows whose image isn't there are dropped with what the downloader met: `image missing: HTTP 404`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets_ray.columns import Columns
from datasets_ray.download import image_path, read_state
from datasets_ray.errors import UserError
from datasets_ray.files import below, check_keys, matching, one_of
from datasets_ray.images import VERIFY, ImageError
from datasets_ray.prompts import RowError
from datasets_ray.records import Checked, caption
from datasets_ray.rows import row
from datasets_ray.shards import Made, write_sharded

FILES, IMAGES = ("pixmo-cap/data", "pixmo-cap"), ("pixmo-cap/images",)
COLUMNS = ("image_url", "caption")


class Maker:
    """Caption rows of a range; picklable. lost: why the downloader has no image of an address."""

    def __init__(self, columns: Columns, root: Path, verify: str, lost: Mapping[str, str]) -> None:
        self.columns, self.root, self.verify, self.lost = columns, root, verify, dict(lost)

    def __call__(self, start: int, stop: int) -> Made:
        made, checked = Made([]), Checked(self.root, self.verify)
        for number, record in enumerate(self.columns.read(start, stop, COLUMNS), start):
            url = record["image_url"]
            try:
                messages = caption(record["caption"])
                if not isinstance(url, str) or not url:
                    raise RowError("no address")
                path = image_path(url)
                if not (self.root / path).exists():
                    raise RowError(f"image missing: {self.lost.get(url, 'not downloaded')}")
                checked.place(path)
            except (RowError, ImageError) as error:
                made.dropped.append((str(url), error.reason))
                continue
            made.rows.append(row(f"pixmo-cap-{number:06d}", images=[{"path": path}], messages=messages, meta={"file": path, "url": url}))
        return made


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    check_keys(spec, ["files", "images", "part", "verify", "rows"])
    one_of(spec, "part", ("caption",))
    verify = one_of(spec, "verify", VERIFY)
    columns = Columns(matching(spec, "files", data_root, (".parquet",), FILES))
    for name in COLUMNS:
        columns.need("files", name, ("string", "large_string"))
    try:
        root = below(spec, "images", data_root, IMAGES, folder=True)
    except UserError as error:
        hint = "python -m datasets_ray.download FILES --images DIR fills it"
        raise UserError(error.what, why=error.why, hint=hint) from None
    count = min(len(columns), spec.get("rows") or len(columns))
    lost = {url: entry["reason"] for url, entry in read_state(root).items() if entry["status"] != "ok"}
    maker = Maker(columns, root, verify, lost)
    return write_sharded(count, maker, Path(out), root=str(root), part="caption", records=len(columns), verify=verify)
