"""Encoder outputs kept on a machine's own disk: a frozen encoder reads an image once, for all arms, epochs and runs that read it there.

In: an image's place in a rows artefact and which encoder it is read by, a text here: models are elsewhere. A data task hands on `Asked`, an
image that has no pixels where its features are kept on the consumer's machine. At the consumer's end `FillFeatures` reads features into the
micro-batches, and pixels of images that have none. Out: packs with `features`, whose `keep` takes what the encoder made of those. A cache
is one of `pixels_cache`'s with other slots: what is torn, damaged or of a changed source is encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL

from datasets_ray import pixels_cache
from datasets_ray.encoding import Place
from datasets_ray.fitted import Fill, image_of
from datasets_ray.images import ImageRecipe, recipe_to_json
from datasets_ray.packing import Batch
from datasets_ray.pixels_cache import Opened, PixelCache, PixelCounts, PixelStore, Slot

VERSION = 1
"""Rises when what is kept of an image changes."""


def home() -> Path:
    """This machine's folder for encoder outputs, beside the one for pixels."""
    pixels = pixels_cache.home()
    return pixels.with_name(pixels.name.replace("pixels", "features"))


@dataclass(frozen=True)
class FeatureStore:
    """Where a stage's encoder outputs are kept, and whose they are."""

    store: PixelStore
    encoder: str
    """Everything besides the pixels that decides an output, down to its bits."""
    tokens: int
    """Of an image."""
    token_bytes: int
    dtype: str
    """What the bytes are: float32 or bfloat16."""


@dataclass
class FeatureCounts(PixelCounts):
    """Images by how their features came. found: kept ones; made: encoded and kept; passed: encoded, where there was no room to keep them;
    damaged: kept ones that weren't what had been written, so encoded again."""


class FeatureCache(PixelCache):
    """The kept features of one rows artefact under one recipe and encoder. OSError where it can't be had."""

    def __init__(self, kept: FeatureStore, directory: str, recipe: ImageRecipe) -> None:
        of = {"features": VERSION, "encoder": kept.encoder, "recipe": recipe_to_json(recipe), "pillow": PIL.__version__}
        self._open(kept.store, directory, of, kept.tokens * kept.token_bytes)

    def load(self, place: Place, out: np.ndarray) -> bool | None:
        """Fills `out`, uint8[tokens, bytes]. None: nothing is kept; False: it was damaged."""
        slot = self.find(place)
        return None if slot is None else self.read(slot, out)

    def write(self, place: Place, stamp: int | None, made: np.ndarray) -> bool:
        """Keeps uint8[tokens, bytes], made of the source as `stamp` knew it. False: there was no room, or nothing to be sure of."""
        return self._put(place, made, stamp) is not None


class Asked(NamedTuple):
    """An image on its way to the consumer. image: its pixels or where they are kept; None where its features were found."""

    place: Place
    stamp: int | None
    image: np.ndarray | Slot | None


class Wanted(NamedTuple):
    """An image that has to be encoded."""

    place: Place
    stamp: int | None
    damaged: bool


@dataclass
class PackFeatures:
    """Of a pack's N images. values: uint8[N, tokens, bytes], unset where they are missing; missing: int64[M], whose pixels are the pack's
    images; dtype: what the bytes are."""

    values: np.ndarray
    missing: np.ndarray
    wanted: Sequence[Wanted]
    dtype: str
    fill: FillFeatures

    def keep(self, made: np.ndarray) -> None:
        """Takes uint8[M, tokens, bytes] of the missing ones."""
        counts = self.fill.counts
        for wanted, one in zip(self.wanted, made, strict=True):
            cache = self.fill.cache(wanted.place.directory)
            written = cache is not None and cache.write(wanted.place, wanted.stamp, one)
            counts.damaged += wanted.damaged
            counts.made += written and not wanted.damaged
            counts.passed += not written and not wanted.damaged


_opened: Opened[FeatureCache] = Opened("encoder outputs")
forget = _opened.forget


def cache_of(kept: FeatureStore, directory: str, recipe: ImageRecipe) -> FeatureCache | None:
    """The cache of these rows in this process; None where it can't be had."""
    return _opened.get((kept, directory, recipe), kept.store.root, lambda: FeatureCache(kept, directory, recipe))


def asked(place: Place, recipe: ImageRecipe, pixels: PixelStore | None, kept: FeatureStore, here: bool) -> Asked:
    """An image as a data task hands it on. here: the consumer is on this machine."""
    cache = cache_of(kept, place.directory, recipe)
    if here and cache is not None and cache.find(place) is not None:
        return Asked(place, None, None)
    stamp = None if cache is None else cache.stamp(place)  # before the pixels are read: what changes meanwhile is encoded again
    return Asked(place, stamp, image_of(place, recipe, pixels, here))  # opened anew: its header may be older than the stamp


def missing(directories: Sequence[str], recipe: ImageRecipe, kept: FeatureStore, rows: Sequence[np.ndarray]) -> int:
    """How many images of these rows, by directory, are still to be encoded."""
    found = [cache_of(kept, directory, recipe) for directory in directories]
    return sum(len(numbers) if cache is None else cache.missing(numbers) for cache, numbers in zip(found, rows, strict=True))


class FillFeatures:
    """What `Stream` does to the micro-batches of a `TrainTask` whose encoder outputs are kept. counts: of what was read or kept so far;
    pixels: how the others' pixels came."""

    def __init__(self, recipe: ImageRecipe, pixels: PixelStore | None, kept: FeatureStore) -> None:
        self.recipe, self.store, self.kept, self.counts = recipe, pixels, kept, FeatureCounts()
        self.pixels = Fill(recipe, pixels)

    def cache(self, directory: str) -> FeatureCache | None:
        return cache_of(self.kept, directory, self.recipe)

    def __call__(self, batches: list[Batch]) -> list[Batch]:
        for batch in batches:
            for pack in batch.streams.values():
                images: list[Asked] = pack.images  # type: ignore[assignment]
                values = np.empty((len(images), self.kept.tokens, self.kept.token_bytes), np.uint8)
                wanted = {at: want for at, one in enumerate(images) if (want := self._read(one, values[at])) is not None}
                left = np.array(list(wanted), dtype=np.int64)
                pack.images = self.pixels._images([self._image(images[at]) for at in wanted])
                pack.grids = pack.grids[left]
                pack.features = PackFeatures(values, left, list(wanted.values()), self.kept.dtype, self)
        return batches

    def _read(self, one: Asked, out: np.ndarray) -> Wanted | None:
        cache = self.cache(one.place.directory)
        sound = None if cache is None else cache.load(one.place, out)
        if sound:
            self.counts.found += 1
            return None
        stamp = cache.stamp(one.place) if cache is not None and one.image is None else one.stamp
        return Wanted(one.place, stamp, sound is False)

    def _image(self, one: Asked) -> np.ndarray | Slot:
        return image_of(one.place, self.recipe, self.store, True) if one.image is None else one.image
