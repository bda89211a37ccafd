"""Question rows made ready for a model: prompts as token ids, images as pixels, and packs of any of them.

In: a rows artefact of questions, a tokenizer, its conversation template and the image recipe. Out: `Prompts` (made once, small) and
`Pixels` (decoded when asked for, kept where they are few); `question_pack` joins both. Nothing here knows a model, so that every model
with the same tokenizer asks the same prompts, and models with the same image recipe see the same pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc

from datasets_ray.errors import UserError
from datasets_ray.images import ImageError, ImageLayout, ImageRecipe, SquareRecipe, image_size, pixels
from datasets_ray.packing import Pack, Segment, pack
from datasets_ray.prompts import generation_prompt
from datasets_ray.rows import RowTable
from datasets_ray.tokens import IGNORE, Encoded, RowError, encode_many, load_tokenizer, require

KEPT_BYTES = 256 << 20
"""Sets whose pixels fit in here stay decoded; larger ones are decoded again for every model."""
UNLIMITED = 1 << 30
"""A prompt is never cut: it would lose its question. The longest is reported."""


@dataclass
class Prompts:
    """What is asked. encoded and prompts: a row of the table each, None where it can't be asked (counted in `dropped` by reason)."""

    encoded: list[Encoded | None]
    prompts: list[str | None]
    layouts: list[list[ImageLayout]]
    """Each row's images: tokens and patch grids."""
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def lengths(self) -> np.ndarray:
        """int64[N]: tokens of each prompt, 0 where the row can't be asked."""
        return np.array([0 if one is None else len(one.ids) for one in self.encoded], dtype=np.int64)

    @property
    def nbytes(self) -> int:
        return int(16 * self.lengths.sum()) + sum(len(text or "") for text in self.prompts) + 200 * len(self.prompts)


def prepare(
    rows: RowTable, tokenizer: str, template: str, recipe: ImageRecipe | None, suffix: str, listed: bool = True, masks: bool = False
) -> Prompts:
    """Renders and tokenises all questions in one batch; nothing is cut. masks: tokenise as training does, more slowly (`encode_many`).

    Raises UserError where a whole set can't be asked: images without a recipe, or a template that doesn't fit the tokenizer.
    """
    tok = load_tokenizer(tokenizer)
    require(template, tok)
    counts = pc.list_value_length(rows.table.column("images")).to_numpy()
    if recipe is None and counts.any():
        raise UserError(f"{int((counts > 0).sum())} questions show images to a model without an image recipe")
    made = Prompts([None] * len(rows), [None] * len(rows), [[] for _ in range(len(rows))])
    asked, rendered = [], []
    # a prompt needs to know how many images there are, not their bytes
    words = rows.table.select(["question", "hint", "options", "meta"]).to_pylist()
    for index, (row, count) in enumerate(zip(words, counts)):
        try:
            made.layouts[index] = _layouts(rows, index, int(count), recipe)
        except ImageError as error:
            made.dropped[error.reason] += 1
            continue
        asking = {**row, "images": [None] * int(count)}
        one = generation_prompt(asking, template, suffix, listed=listed, bos=tok.bos_token or "", eos=tok.eos_token or "")
        asked.append(index)
        rendered.append(one)
    tokens = [[one.tokens for one in made.layouts[index]] for index in asked]
    for index, one, result in zip(asked, rendered, encode_many(rendered, tok, tokens, UNLIMITED, masks=masks)):
        if isinstance(result, RowError):
            made.dropped[result.reason] += 1
        else:
            made.encoded[index], made.prompts[index] = result, one.text
    return made


def _layouts(rows: RowTable, index: int, count: int, recipe: ImageRecipe | None) -> list[ImageLayout]:
    if recipe is None or not count:
        return []
    if recipe.uniform:
        return [recipe.layout(1, 1)] * count
    return [recipe.layout(*image_size(image, rows.root)) for image in _images(rows, index)]


def _images(rows: RowTable, index: int) -> list[dict]:
    return rows.table.column("images")[index].as_py()


class Pixels:
    """A set's images under one recipe: `of(row)` → list of uint8[H, W, 3]. Raises ImageError for an image that can't be read."""

    def __init__(self, rows: RowTable, recipe: ImageRecipe | None) -> None:
        self.rows, self.recipe = rows, recipe
        self._kept: dict[int, list[np.ndarray]] = {}
        self._bytes = 0

    @property
    def most_bytes(self) -> int:
        """What this set may come to hold in memory."""
        images = int(pc.sum(pc.list_value_length(self.rows.table.column("images"))).as_py() or 0)
        if self.recipe is None:
            return 0
        each = 3 * self.recipe.size**2 if isinstance(self.recipe, SquareRecipe) else KEPT_BYTES
        return min(KEPT_BYTES, images * each)

    def of(self, index: int) -> list[np.ndarray]:
        if self.recipe is None:
            return []
        if index in self._kept:
            return self._kept[index]
        made = [pixels(image, self.recipe, self.rows.root) for image in _images(self.rows, index)]
        size = sum(image.nbytes for image in made)
        if self._bytes + size <= KEPT_BYTES:
            self._kept[index] = made
            self._bytes += size
        return made


def question_pack(prompts: Prompts, images: Sequence[Sequence[np.ndarray]], indices: Sequence[int], recipe: ImageRecipe | None) -> Pack:
    """These questions end to end, in this order: S segments, nothing learned. images: each question's own, decoded."""
    segments = []
    for index, shown in zip(indices, images):
        one = prompts.encoded[index]
        assert one is not None, "this row can't be asked"
        grids = np.array([[1, layout.grid_h, layout.grid_w] for layout in prompts.layouts[index]], dtype=np.int64).reshape(-1, 3)
        segments.append(Segment(one.ids, np.full(len(one.ids), IGNORE, dtype=np.int64), tuple(shown), grids, len(one.ids)))
    shape = None
    if recipe is not None and recipe.uniform:
        shape = next((image.shape[:2] for shown in images for image in shown), (0, 0))
    return pack(segments, range(len(segments)), shape)
