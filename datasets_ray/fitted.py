"""The pixels of a row's image, wherever they come from: this process's memory, the machine's cache, the image itself.

In: an image's place, its recipe and, where pixels are kept, the `PixelStore`. Out: uint8[H, W, 3], the same whichever way. A data task
hands on a `Slot` where the consumer can read kept pixels by itself; `Fill`, at the consumer's end, reads them into the micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from datasets_ray.encoding import Place
from datasets_ray.errors import UserError
from datasets_ray.images import ImageError, ImageRecipe, open_image, pixels, rgb
from datasets_ray.kept import Kept
from datasets_ray.packing import Batch
from datasets_ray.pixels_cache import PixelCounts, PixelStore, Slot, cache_of
from datasets_ray.rows import open_rows

PIXELS: Kept[np.ndarray] = Kept(96 << 20)
"""Fitted images of this process, by place and recipe: a miniature's whole training set, a drop of a large one."""


HEADERS = 64
"""Images of a step that are open at a time."""


class Header(NamedTuple):
    """An image that has been opened, and the stamp of its source from before."""

    stamp: int | None
    image: Image.Image


class Headers:
    """The images of a step whose headers were read for their sizes, so that they needn't be opened again. Close it (or use `with`)."""

    def __init__(self, recipe: ImageRecipe | None, store: PixelStore | None) -> None:
        self.recipe, self.store = recipe, store
        self._opened: dict[Place, Header] = {}

    def size(self, place: Place, image: Mapping[str, Any]) -> tuple[int, int] | None:
        """(width, height) from the image's header, or of kept pixels of a uniform recipe: their header was sound. Raises ImageError."""
        cache = cache_of(self.store, place.directory, self.recipe) if self.recipe is not None else None
        stamp = cache.stamp(place) if cache else 0
        slot = cache.find(place, stamp) if cache and self.recipe.uniform and stamp is not None else None  # type: ignore[union-attr]
        if slot is not None:
            return slot.width, slot.height
        opened = open_image(image, open_rows(place.directory).root)
        if stamp is None or len(self._opened) >= HEADERS:
            opened.close()
        else:
            self._opened[place] = Header(stamp, opened)
        return opened.size

    def take(self, place: Place) -> Header | None:
        return self._opened.pop(place, None)

    def __enter__(self) -> Headers:
        return self

    def __exit__(self, *_: object) -> None:
        while self._opened:
            self._opened.popitem()[1].image.close()


def image_of(place: Place, recipe: ImageRecipe, store: PixelStore | None, here: bool, header: Header | None = None) -> np.ndarray | Slot:
    """An image's pixels; where they are kept and the consumer is `here`, on this machine, the slot in which it finds them."""
    cache = cache_of(store, place.directory, recipe)
    if cache is None:
        return _remembered(place, recipe, header)
    found = cache.keep(place, lambda: fresh(place, recipe, header), header.stamp if header else None)
    return found if here or not isinstance(found, Slot) else read(found, recipe, store)[0]


def fresh(place: Place, recipe: ImageRecipe, header: Header | None = None) -> np.ndarray:
    """An image decoded and fitted. header: it is open already. UserError when its data is broken."""
    table = open_rows(place.directory)
    try:
        if header is not None:
            return recipe.fit(rgb(header.image))
        return pixels(table.table.column("images")[place.row].as_py()[place.image], recipe, table.root)
    except ImageError as error:
        row = table.table.slice(place.row, 1)
        # its header was sound, so other ranks count on this sample: it can't be dropped any more
        hint = "build the dataset stage again; sources drop and count what doesn't decode"
        raise UserError(f"the image of row {row.column('id')[0].as_py()!r} can't be decoded", why=str(error), hint=hint) from error


def _remembered(place: Place, recipe: ImageRecipe, header: Header | None) -> np.ndarray:
    """`fresh` once per process."""
    made = PIXELS.get((place, recipe))
    if made is None:
        made = fresh(place, recipe, header)
        PIXELS.put((place, recipe), made, made.nbytes + 200)
    return made


def read(slot: Slot, recipe: ImageRecipe, store: PixelStore | None, out: np.ndarray | None = None) -> tuple[np.ndarray, bool]:
    """Kept pixels, in `out` where it is given, and whether they were sound; those that weren't are decoded and kept again."""
    cache = cache_of(store, slot.place.directory, recipe)
    out = np.empty((slot.height, slot.width, 3), np.uint8) if out is None else out
    if cache is not None and cache.read(slot, out):
        return out, True
    made = fresh(slot.place, recipe) if cache is None else cache.make(slot.place, lambda: fresh(slot.place, recipe))
    out[:] = made
    return out, False


def missing(directories: Sequence[str], recipe: ImageRecipe, store: PixelStore | None, rows: Sequence[np.ndarray]) -> int:
    """How many images of these rows, by directory, are still to be made."""
    total = 0
    for directory, numbers in zip(directories, rows, strict=True):
        cache = cache_of(store, directory, recipe)
        total += len(numbers) if cache is None else cache.missing(numbers)
    return total


class Fill:
    """What `Stream` does to the micro-batches of a `TrainTask` before it hands them out. counts: of all of them so far."""

    def __init__(self, recipe: ImageRecipe, store: PixelStore | None) -> None:
        self.recipe, self.store, self.counts = recipe, store, PixelCounts()

    def __call__(self, batches: list[Batch]) -> list[Batch]:
        for batch in batches:
            for one in batch.streams.values():
                one.images = self._images(one.images)
        return batches

    def _images(self, images: Any) -> np.ndarray | list[np.ndarray]:
        """uint8[N, H, W, 3] of a uniform recipe, else a list."""
        if not self.recipe.uniform:
            return [self._image(image) for image in images]
        side: int = self.recipe.size  # type: ignore[attr-defined]
        made = np.empty((len(images), side, side, 3), dtype=np.uint8)
        for image, out in zip(images, made):
            self._image(image, out)
        return made

    def _image(self, image: np.ndarray | Slot, out: np.ndarray | None = None) -> np.ndarray:
        if isinstance(image, Slot):
            made, sound = read(image, self.recipe, self.store, out)
            self.counts.damaged += not sound
            self.counts.made += sound and image.made
            self.counts.found += sound and not image.made
            return made
        self.counts.passed += 1
        if out is None:
            return image
        out[:] = image
        return out
