"""Kept encoder outputs are what the encoder made, whatever was killed, damaged, replaced or had no room; found ones need no pixels."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest

from datasets_ray import features_cache, fitted, pipeline, pixels_cache, streaming
from datasets_ray.encoding import Place
from datasets_ray.features_cache import FeatureCache, FeatureStore
from datasets_ray.images import recipe_from_json
from datasets_ray.kept import Kept
from datasets_ray.pipeline import TrainTask, index_of, train_batches
from datasets_ray.pixels_cache import PixelStore
from tests.datasets_ray import test_pixels_cache
from tests.datasets_ray.test_pipeline import SQUARE, chats, picture, vlm
from tests.datasets_ray.test_pixels_cache import IMAGES, counted, ended, in_a_process

directories = test_pixels_cache.directories
MB = 1 << 20
TOKENS, BYTES = 4, 24


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(pipeline, "RECORDS", Kept(0))
    monkeypatch.setattr(fitted, "PIXELS", Kept(0))
    pixels_cache.forget()
    features_cache.forget()
    yield
    pixels_cache.forget()
    features_cache.forget()


@pytest.fixture
def kept(tmp_path) -> FeatureStore:
    return FeatureStore(PixelStore(64 * MB, str(tmp_path / "features")), "an encoder", TOKENS, BYTES, "float32")


def encoded(image: np.ndarray) -> np.ndarray:
    """uint8[TOKENS, BYTES] that only this image has."""
    seed = int.from_bytes(image.tobytes()[:64], "little") % 2**32
    return np.random.default_rng(seed).integers(0, 256, (TOKENS, BYTES), dtype=np.uint8)


def collect(directories, kept, pixels=None, image=SQUARE, **more):
    """Every image's features in the order of training, as a stage gets them, and how they came."""
    index = index_of(directories, 8, epochs=more.pop("epochs", 1), seed=3)
    seen = []
    with train_batches(directories, vlm(image), index, micro_tokens=300, store=pixels, features=kept, **more) as stream:
        for batch in (batch for step in stream for batch in step):
            pack = batch.streams["text"]
            if kept is None:
                seen += [encoded(one) for one in pack.images]
                continue
            made = [encoded(one) for one in pack.images]
            assert len(pack.grids) == len(made) == len(pack.features.missing)
            if made:
                pack.features.keep(np.stack(made))
            values = pack.features.values.copy()
            for at, one in zip(pack.features.missing, made):
                values[at] = one
            assert len(values) == pack.image_counts.sum()
            seen += list(values)
        return np.stack(seen), stream.features.to_json() if stream.features else {}, stream.pixels


def open_cache(directory: Path, kept: FeatureStore) -> FeatureCache:
    made = features_cache.cache_of(kept, str(directory), recipe_from_json(SQUARE))
    assert made is not None
    return made


@pytest.mark.parametrize("with_pixels", [False, True], ids=["pixels decoded", "pixels kept"])
def test_features_are_the_same_with_and_without(directories, kept, tmp_path, monkeypatch, with_pixels):
    pixels = PixelStore(64 * MB, str(tmp_path / "pixels")) if with_pixels else None
    plain, nothing, _ = collect(directories, None)
    assert nothing == {}
    first, made, _ = collect(directories, kept, pixels)
    assert np.array_equal(first, plain)
    assert made == counted(made=IMAGES)

    def decoded(*_):
        raise AssertionError("nothing needs pixels any more")

    monkeypatch.setattr(fitted, "fresh", decoded)
    pixels_cache.forget()
    later, found, read = collect(directories, kept, pixels)
    assert np.array_equal(later, plain)
    assert found == counted(found=IMAGES)
    assert read is None or sum(read.to_json().values()) == 0


def test_another_encoder_and_another_recipe_have_features_of_their_own(directories, kept):
    collect(directories, kept)
    other = FeatureStore(kept.store, "another encoder", TOKENS, BYTES, "float32")
    assert collect(directories, other)[1] == counted(made=IMAGES)
    assert collect(directories, kept, image={**SQUARE, "fit": "crop"})[1] == counted(made=IMAGES)
    assert collect(directories, kept)[1] == counted(found=IMAGES)


def test_every_rank_keeps_its_share_for_all(directories, kept):
    ranks = [collect(directories, kept, rank=rank, world=2)[1] for rank in range(2)]
    assert sum(one["made"] for one in ranks) == IMAGES
    assert collect(directories, kept)[1] == counted(found=IMAGES)


def test_a_photograph_that_was_replaced_is_encoded_again(directories, kept):
    collect(directories, kept)
    photo = next((directories[0].parent / "photos").iterdir())
    photo.write_bytes(picture(1234)["bytes"])
    again, counts, _ = collect(directories, kept)
    assert np.array_equal(again, collect(directories, None)[0])
    assert counts == counted(found=IMAGES - 1, made=1)


def test_a_writer_killed_half_way_leaves_nothing_that_is_read(directories, kept, monkeypatch):
    place, whole = Place(str(directories[0]), 1), os.pwrite

    def killed(file: int, data: memoryview, offset: int) -> int:
        whole(file, data[: len(data) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def write() -> None:
        monkeypatch.setattr(os, "pwrite", killed)
        open_cache(directories[0], kept).write(place, 0, np.ones((TOKENS, BYTES), np.uint8))

    assert ended(in_a_process(write)) == -signal.SIGKILL
    assert open_cache(directories[0], kept).find(place) is None
    values, counts, _ = collect(directories, kept)
    assert np.array_equal(values, collect(directories, None)[0])
    assert counts == counted(made=IMAGES)


@pytest.mark.parametrize("harm", ["a byte", "cut short", "index torn"])
def test_damage_is_noticed_counted_and_mended(directories, kept, harm):
    plain = collect(directories, kept)[0]
    cache = open_cache(directories[0], kept)
    slot = cache.find(Place(str(directories[0]), 1))
    assert slot is not None
    file = next(path for path in cache.path.iterdir() if path.name.endswith("-000"))
    if harm == "a byte":
        with file.open("r+b") as opened:
            opened.seek(slot.number * cache.slot_bytes + 7)
            value = opened.read(1)[0]
            opened.seek(-1, 1)
            opened.write(bytes([value ^ 1]))
    elif harm == "cut short":
        os.truncate(file, slot.number * cache.slot_bytes + 5)
    else:
        cache.entries[slot.number : slot.number + 1]["check"] += 1
    features_cache.forget()
    values, counts, _ = collect(directories, kept)
    assert np.array_equal(values, plain)
    assert counts["damaged"] == {"a byte": 1, "index torn": 1}.get(harm, counts["damaged"]) >= 1
    assert counts == counted(found=IMAGES - counts["damaged"], damaged=counts["damaged"])
    assert collect(directories, kept)[1] == counted(found=IMAGES)


def test_what_has_no_room_is_encoded_and_counted(directories, kept):
    small = FeatureStore(PixelStore(1, kept.store.folder), kept.encoder, TOKENS, BYTES, "float32")
    for _ in range(2):
        values, counts, _ = collect(directories, small)
        assert np.array_equal(values, collect(directories, None)[0])
        assert counts == counted(passed=IMAGES)


def test_without_a_usable_folder_images_are_encoded_as_ever(directories, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    lost = FeatureStore(PixelStore(MB, str(tmp_path / "file")), "an encoder", TOKENS, BYTES, "float32")
    values, counts, _ = collect(directories, lost)
    assert np.array_equal(values, collect(directories, None)[0])
    assert counts == counted(passed=IMAGES)
    assert "encoder outputs aren't kept" in caplog.text


def test_a_task_elsewhere_sends_pixels_that_the_consumer_does_not_need(directories, kept, monkeypatch):
    plain = collect(directories, kept)[0]
    names = tuple(str(directory) for directory in directories)
    task = pickle.loads(pickle.dumps(TrainTask(names, vlm(SQUARE), 0, 1, 300, None, "here", kept)))
    for where, sent in (("here", type(None)), ("elsewhere", np.ndarray)):
        monkeypatch.setattr(pipeline, "node", lambda where=where: where)
        images = [one for batch in task(np.arange(8))[0] for one in batch.streams["text"].images]
        assert images and all(type(one.image) is sent for one in images)
    ran = iter(["here"])  # where the stream is made; its task runs elsewhere
    monkeypatch.setattr(pipeline, "node", lambda: next(ran, "elsewhere"))
    values, counts, _ = collect(directories, kept)
    assert np.array_equal(values, plain) and counts == counted(found=IMAGES)


def test_rows_of_text_alone_have_no_features(kept, tmp_path):
    from datasets_ray.rows import write_rows

    write_rows([one for one in chats(20) if not one["images"]], tmp_path / "text")
    index = index_of([tmp_path / "text"], 4, epochs=1)
    with train_batches([tmp_path / "text"], vlm(SQUARE), index, features=kept) as stream:
        packs = [batch.streams["text"] for step in stream for batch in step]
    assert packs and all(len(pack.images) == len(pack.features.values) == len(pack.grids) == 0 for pack in packs)


def test_features_lie_beside_pixels(monkeypatch, tmp_path):
    monkeypatch.setenv("FINEGRID_PIXELS", str(tmp_path / "mine"))
    assert features_cache.home() == tmp_path / "mine" / f"finegrid-features-{os.getuid()}"


@pytest.mark.slow
def test_ray_data_sends_pixels_once_and_places_afterwards(directories, kept, monkeypatch):
    ray = pytest.importorskip("ray")
    plain = collect(directories, None)[0]
    monkeypatch.setattr(streaming, "HEAD_BYTES", 0)  # not the consumer's own thread
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        first, later = collect(directories, kept), collect(directories, kept)
    finally:
        ray.shutdown()
    assert np.array_equal(first[0], plain) and np.array_equal(later[0], plain)
    assert first[1] == counted(made=IMAGES) and later[1] == counted(found=IMAGES)
