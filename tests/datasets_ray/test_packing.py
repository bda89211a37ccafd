"""Packing: every sample exactly once, equally many micro-batches for all ranks, and segments that can be taken apart again."""

from __future__ import annotations

import numpy as np
import pytest

from datasets_ray.packing import Segment, assign, pack
from datasets_ray.tokens import IGNORE, IMAGE_ID


@pytest.mark.parametrize("seed", range(60))
def test_assignment_covers_fits_and_is_even(seed):
    rng = np.random.default_rng(seed)
    world, capacity = int(rng.integers(1, 6)), int(rng.integers(8, 200))
    costs = rng.integers(0, capacity * 3 // 2, size=int(rng.integers(0, 80))).tolist()
    ranks = assign(costs, capacity, world)
    assert len(ranks) == world
    assert len({len(bins) for bins in ranks}) == 1
    assert len(ranks[0]) >= 1
    assert sorted(sample for bins in ranks for members in bins for sample in members) == list(range(len(costs)))
    for bins in ranks:
        for members in bins:
            assert members == sorted(members)
            assert len(members) <= 1 or sum(costs[i] for i in members) <= capacity
    assert ranks == assign(costs, capacity, world)


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_wastes_little(seed):
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 60, size=120).tolist()
    bins = assign(costs, 100, 1)[0]
    assert len(bins) <= int(np.ceil(sum(costs) / 100 * 11 / 9)) + 1  # the bound of best-fit decreasing


def test_a_sample_above_the_capacity_is_alone():
    ranks = assign([500, 10, 10], 100, 1)
    assert [0] in ranks[0]


def test_ranks_carry_alike():
    costs = [10] * 16
    loads = [sum(costs[i] for members in bins for i in members) for bins in assign(costs, 40, 4)]
    assert loads == [40, 40, 40, 40]
    spread = assign([10] * 3, 100, 2)  # one bin would do, but a rank would idle
    assert sorted(len(bins[0]) for bins in spread) == [1, 2]


def segment(rng: np.random.Generator, length: int, images: int) -> Segment:
    ids = rng.integers(0, 99, length)
    slots = rng.choice(length, size=min(length, images * 2), replace=False)
    ids[slots] = IMAGE_ID
    labels = np.where(rng.random(length) < 0.5, ids, IGNORE)
    pictures = tuple(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8) for _ in range(images))
    return Segment(ids, labels, pictures, rng.integers(1, 9, (images, 3)), length)


@pytest.mark.parametrize("seed", range(20))
def test_a_pack_comes_apart_into_its_segments(seed):
    rng = np.random.default_rng(seed)
    segments = [segment(rng, int(rng.integers(1, 30)), int(rng.integers(0, 3))) for _ in range(int(rng.integers(1, 8)))]
    numbers = rng.permutation(100)[: len(segments)]
    made = pack(segments, numbers, (4, 6))
    assert made.lengths.sum() == made.tokens == len(made.labels) == len(made.positions)
    assert np.array_equal(made.sample, numbers)
    assert np.array_equal(made.image_slots, np.flatnonzero(made.ids == IMAGE_ID))
    ends, image_ends = np.cumsum(made.lengths), np.cumsum(made.image_counts)
    for at, one in enumerate(segments):
        here = slice(ends[at] - made.lengths[at], ends[at])
        assert np.array_equal(made.ids[here], one.ids)
        assert np.array_equal(made.labels[here], one.labels)
        assert np.array_equal(made.positions[here], np.arange(len(one.ids)))
        pictures = slice(image_ends[at] - made.image_counts[at], image_ends[at])
        assert np.array_equal(made.images[pictures], np.array(one.images).reshape(-1, 4, 6, 3))
        assert np.array_equal(made.grids[pictures], one.grids)


def test_empty_packs_keep_their_types():
    made = pack([], [], (4, 6))
    assert made.tokens == 0
    assert made.images.shape == (0, 4, 6, 3)
    assert made.images.dtype == np.uint8
    assert made.grids.shape == (0, 3)
    assert all(a.dtype == np.int64 for a in (made.ids, made.labels, made.positions, made.lengths, made.sample, made.grids))
    assert pack([], [], None).images == []
