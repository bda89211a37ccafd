"""Kept pixels are the pixels: the same batches with and without, whatever was killed, damaged, evicted or written twice meanwhile."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets_ray import diskcache, fitted, pipeline, pixels_cache, streaming
from datasets_ray.encoding import Place
from datasets_ray.images import recipe_from_json
from datasets_ray.kept import Kept
from datasets_ray.pipeline import TrainTask, index_of, train_batches
from datasets_ray.pixels_cache import PixelCache, PixelStore, Slot
from datasets_ray.rows import row, write_rows
from tests.datasets_ray.test_pipeline import NATIVE, SQUARE, chats, picture, same_steps, vlm

MB = 1 << 20
IMAGES = 23
"""Of the rows of `directories`."""
LARGE = {"kind": "square", "size": 64, "patch": 8, "fit": "crop"}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    """A process that starts: it has made nothing before and has no cache open."""
    monkeypatch.setattr(pipeline, "RECORDS", Kept(0))
    monkeypatch.setattr(fitted, "PIXELS", Kept(0))
    pixels_cache.forget()
    yield
    pixels_cache.forget()


@pytest.fixture
def store(tmp_path) -> PixelStore:
    return PixelStore(64 * MB, str(tmp_path / "pixels"))


@pytest.fixture
def directories(tmp_path) -> list[Path]:
    """Rows that hold their images' bytes, some two of them, and rows whose images lie in files."""
    rows = chats(20)
    messages = [{"role": "user", "text": "<image> or <image>?"}, {"role": "assistant", "text": "a lumora"}]
    rows.insert(3, row("two", images=[picture(90), picture(91)], messages=messages))
    write_rows(rows, tmp_path / "a")
    files = []
    (tmp_path / "photos").mkdir()
    for number, one in enumerate(chats(13, 30)):
        for image in one["images"]:
            (tmp_path / "photos" / f"{number}.png").write_bytes(image["bytes"])
            one["images"] = [{"bytes": None, "path": f"{number}.png"}]
        files.append(one)
    write_rows(files, tmp_path / "b", root=str(tmp_path / "photos"))
    return [tmp_path / "a", tmp_path / "b"]


def collect(directories, image=SQUARE, store=None, **more):
    index = index_of(directories, 8, epochs=more.pop("epochs", 1), seed=3, order="modality_grouped")
    with train_batches(directories, vlm(image), index, micro_tokens=300, store=store, **more) as stream:
        return list(stream), stream.stats, stream.pixels.to_json() if stream.pixels else {}


def counted(found: int = 0, made: int = 0, passed: int = 0, damaged: int = 0) -> dict[str, int]:
    return {"found": found, "made": made, "passed": passed, "damaged": damaged}


def cache(directory: Path, store: PixelStore, image=SQUARE) -> PixelCache:
    made = pixels_cache.cache_of(store, str(directory), recipe_from_json(image))
    assert made is not None
    return made


def in_a_process(work: Callable[[], None]) -> int:
    """Runs `work` in a forked child; its wait status."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("image", [SQUARE, NATIVE], ids=["square", "native"])
def test_batches_are_the_same_with_and_without(directories, store, image):
    plain, stats, nothing = collect(directories, image, epochs=1.5)
    assert nothing == {}
    first, first_stats, made = collect(directories, image, store, epochs=1.5)
    later, later_stats, found = collect(directories, image, store, epochs=1.5)
    assert same_steps(first, plain)
    assert same_steps(later, plain)
    assert first_stats == later_stats == stats
    images = stats.images
    assert made["made"] == IMAGES  # each image once, whatever their epoch
    assert made == counted(made=IMAGES, found=images - IMAGES)
    assert found == counted(found=images)
    assert [type(batch.streams["text"].images) for step in later for batch in step] == [
        type(batch.streams["text"].images) for step in plain for batch in step
    ]


def test_another_recipe_and_other_rows_have_pixels_of_their_own(directories, store):
    collect(directories, SQUARE, store)
    assert collect(directories, {**SQUARE, "fit": "crop"}, store)[2]["found"] == 0
    assert collect(directories, SQUARE, store)[2]["made"] == 0
    rows = [one for one in chats(20) if one["images"]]
    write_rows(rows, directories[0].parent / "c")
    assert collect([directories[0].parent / "c"], SQUARE, store)[2]["found"] == 0


def test_every_rank_keeps_its_share_for_all(directories, store):
    plain = [collect(directories, rank=rank, world=2)[0] for rank in range(2)]
    first = [collect(directories, SQUARE, store, rank=rank, world=2) for rank in range(2)]
    assert [same_steps(one[0], other) for one, other in zip(first, plain)] == [True, True]
    assert sum(one[2]["made"] for one in first) == IMAGES
    assert collect(directories, SQUARE, store)[2] == counted(found=IMAGES)


def test_a_photograph_that_was_replaced_is_decoded_again(directories, store):
    collect(directories, SQUARE, store)
    photo = next((directories[0].parent / "photos").iterdir())
    photo.write_bytes(picture(1234)["bytes"])
    plain = collect(directories)[0]
    again = collect(directories, SQUARE, store)
    assert same_steps(again[0], plain)
    assert again[2] == counted(found=IMAGES - 1, made=1)


@pytest.mark.parametrize("image", [SQUARE, NATIVE], ids=["square", "native"])
@pytest.mark.parametrize("most", [64, 2])
def test_an_image_is_opened_once_and_every_file_is_closed(directories, store, image, most, monkeypatch):
    opened = []
    whole = Image.open

    def counted(source):
        opened.append(whole(source))
        return opened[-1]

    monkeypatch.setattr(fitted, "HEADERS", most)
    monkeypatch.setattr(Image, "open", counted)
    for where in (None, store):
        steps = collect(directories, image, where)[0]
        assert len(opened) == IMAGES if most > 8 else IMAGES < len(opened) < 2 * IMAGES
        assert all(one.fp is None or one.fp.closed for one in opened)
        opened.clear()
    assert same_steps(collect(directories, image)[0], steps)


def test_what_changes_between_header_and_pixels_is_decoded_again(directories, store, tmp_path):
    place, recipe = Place(str(directories[1]), 1), recipe_from_json(SQUARE)
    old = fitted.fresh(place, recipe)
    with fitted.Headers(recipe, store) as headers:
        assert headers.size(place, {"bytes": None, "path": "1.png"}) == Image.open(tmp_path / "photos" / "1.png").size
        (tmp_path / "new.png").write_bytes(picture(123)["bytes"])
        os.replace(tmp_path / "new.png", tmp_path / "photos" / "1.png")
        slot = fitted.image_of(place, recipe, store, True, headers.take(place))
    assert isinstance(slot, Slot)
    assert np.array_equal(fitted.read(slot, recipe, store)[0], old)  # of the file that was opened, and kept as that file's
    new = fitted.fresh(place, recipe)
    assert not np.array_equal(new, old)
    assert cache(directories[1], store).find(place) is None
    assert np.array_equal(fitted.read(fitted.image_of(place, recipe, store, True), recipe, store)[0], new)


def test_a_writer_killed_half_way_leaves_nothing_that_is_read(directories, store, monkeypatch):
    place = Place(str(directories[0]), 1)
    plain = fitted.fresh(place, recipe_from_json(SQUARE))
    whole = os.pwrite

    def killed(file: int, data: memoryview, offset: int) -> int:
        whole(file, data[: len(data) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def write() -> None:
        monkeypatch.setattr(os, "pwrite", killed)
        cache(directories[0], store).keep(place, lambda: plain)

    assert ended(in_a_process(write)) == -signal.SIGKILL
    kept = cache(directories[0], store)
    assert (kept.path / "pixels-000").stat().st_size > 0
    assert kept.find(place) is None
    steps, _, counts = collect(directories, SQUARE, store)
    assert same_steps(steps, collect(directories)[0])
    assert counts == counted(made=IMAGES)


@pytest.mark.parametrize("harm", ["a byte", "cut short", "index torn", "gone"])
def test_damage_is_noticed_counted_and_mended(directories, store, harm):
    collect(directories, SQUARE, store)
    kept = cache(directories[0], store)
    place = Place(str(directories[0]), 1)
    slot = kept.find(place)
    assert slot is not None
    file = kept.path / "pixels-000"
    if harm == "a byte":
        with file.open("r+b") as opened:
            opened.seek(slot.number * kept.slot_bytes + 7)
            value = opened.read(1)[0]
            opened.seek(-1, 1)
            opened.write(bytes([value ^ 1]))
    elif harm == "cut short":
        os.truncate(file, slot.number * kept.slot_bytes + 5)
    elif harm == "index torn":
        kept.entries[slot.number : slot.number + 1]["check"] += 1
    else:
        file.unlink()
    pixels_cache.forget()
    plain = collect(directories)[0]
    steps, _, counts = collect(directories, SQUARE, store)
    assert same_steps(steps, plain)
    assert counts["damaged"] == {"a byte": 1, "index torn": 1}.get(harm, counts["damaged"]) >= 1
    assert counts["damaged"] + counts["found"] == IMAGES
    steps, _, counts = collect(directories, SQUARE, store)
    assert same_steps(steps, plain)
    assert counts == counted(found=IMAGES)


def test_two_processes_write_the_same_slots_at_once(directories, store):
    plain = collect(directories)[0]

    def read() -> None:
        steps, _, counts = collect(directories, SQUARE, store)
        assert same_steps(steps, plain)
        assert counts["damaged"] == counts["passed"] == 0

    children = [in_a_process(read) for _ in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0]
    assert collect(directories, SQUARE, store)[2] == counted(found=IMAGES)


def many(directory: Path, count: int = 30) -> Path:
    write_rows([one for one in chats(count) if one["images"]], directory)
    return directory


def test_the_least_recently_used_cache_goes_first(tmp_path):
    """A cache of 20 to 24 images of 64 px takes 250 to 300 KB; two fit."""
    folder = tmp_path / "pixels"
    store = PixelStore(600_000, str(folder))
    made = [many(tmp_path / name, 30 + 3 * number) for number, name in enumerate("abc")]
    for directory in made[:2]:
        collect([directory], LARGE, store)
        pixels_cache.forget()
    paths = {path.name for path in folder.iterdir()}
    assert len(paths) == 2
    first, second = (cache(directory, store, LARGE).path for directory in made[:2])
    pixels_cache.forget()
    os.utime(first / "about.json", (2000, 2000))
    os.utime(second / "about.json", (1000, 1000))
    steps, stats, counts = collect([made[2]], LARGE, store)
    assert same_steps(steps, collect([made[2]], LARGE)[0])
    assert counts == counted(made=stats.images)
    assert first.exists()
    assert not second.exists()
    assert sum(diskcache.disk_bytes(path) for path in folder.iterdir()) <= store.limit


def test_nobody_evicts_what_is_open_and_what_has_no_room_travels(tmp_path):
    store = PixelStore(400_000, str(tmp_path / "pixels"))
    first, second = (many(tmp_path / name, count) for name, count in (("a", 30), ("b", 33)))
    collect([first], LARGE, store)
    kept = cache(first, store, LARGE)
    steps, stats, counts = collect([second], LARGE, store)
    assert kept.path.exists()
    assert same_steps(steps, collect([second], LARGE)[0])
    assert counts["passed"] > 0
    assert counts["passed"] + counts["made"] == stats.images
    assert collect([first], LARGE, store)[2]["damaged"] == 0


def test_nothing_of_the_users_own_is_touched(directories, tmp_path):
    """A folder that holds other things, hidden and old ones too, may be named."""
    for name in (".ssh", "work"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for file in ("file", "about.json"):
            (tmp_path / "own" / name / file).write_text("mine")
        os.utime(tmp_path / "own" / name, (0, 0))
    collect(directories, store=PixelStore(1, str(tmp_path / "own")))  # no room: everything that is ours goes
    assert all((tmp_path / "own" / name / "about.json").read_text() == "mine" for name in (".ssh", "work"))


@pytest.mark.parametrize("lost", ["lock", "about.json", "index"])
def test_a_cache_that_lost_a_file_is_made_anew(directories, store, lost):
    collect(directories, store=store)
    pixels_cache.forget()
    for path in Path(store.folder).iterdir():
        (path / lost).unlink()
    assert collect(directories, store=store)[2]["made"] > 0
    pixels_cache.forget()
    assert collect(directories, store=store)[2]["found"] > 0


def test_a_slot_of_another_source_is_not_read(directories, store):
    """Another machine saw the new photo, this one kept the old."""
    collect(directories, store=store)
    kept = cache(directories[1], store)
    shown = next(row for row, images in enumerate(kept.table.column("images")) if images)
    slot = kept.find(Place(str(directories[1]), shown, 0))
    assert slot is not None
    out = np.empty((slot.height, slot.width, 3), np.uint8)
    assert kept.read(slot, out) and not kept.read(slot._replace(stamp=slot.stamp + 1), out)


def test_a_task_that_ran_here_sends_pixels_when_it_runs_elsewhere(directories, store, monkeypatch):
    index = index_of(directories, 8, epochs=1, seed=3)
    task = pipeline.TrainTask(tuple(map(str, directories)), vlm(SQUARE), 0, 1, 300, store, "here")
    monkeypatch.setattr(pipeline, "node", lambda: "here")

    def sent(one):
        return [image for batch in one(index[0])[0] for stream in batch.streams.values() for image in stream.images]

    assert all(isinstance(image, Slot) for image in sent(task))
    monkeypatch.setattr(pipeline, "node", lambda: "elsewhere")
    assert not any(isinstance(image, Slot) for image in sent(pickle.loads(pickle.dumps(task))))


def test_leftovers_of_killed_processes_are_cleared(tmp_path):
    stale, recent = tmp_path / ".gone-a-1", tmp_path / ".new-b"
    for path in (stale, recent):
        path.mkdir()
    os.utime(stale, (1000, 1000))
    diskcache.make_room(tmp_path, MB, 1)
    assert [path.name for path in tmp_path.iterdir()] == [".new-b"]


def test_without_a_usable_folder_pixels_are_made_as_ever(directories, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    store = PixelStore(MB, str(tmp_path / "file"))
    steps, stats, counts = collect(directories, SQUARE, store)
    assert same_steps(steps, collect(directories)[0])
    assert counts == counted(passed=stats.images)
    assert "pixels aren't kept" in caplog.text


def test_only_a_consumer_on_the_same_machine_is_sent_slots(directories, store):
    names = tuple(str(directory) for directory in directories)
    here = TrainTask(names, vlm(), 0, 1, 300, store, node="")
    elsewhere = TrainTask(names, vlm(), 0, 1, 300, store, node="another machine")
    numbers = np.arange(8)
    slots = [image for batch in here(numbers)[0] for image in batch.streams["text"].images]
    sent = [image for batch in elsewhere(numbers)[0] for image in batch.streams["text"].images]
    assert slots
    assert all(isinstance(image, Slot) for image in slots)
    assert all(isinstance(image, np.ndarray) for image in sent)
    plain = [image for batch in TrainTask(names, vlm(), 0, 1, 300)(numbers)[0] for image in batch.streams["text"].images]
    assert all(np.array_equal(one, other) for one, other in zip(sent, plain, strict=True))


def test_the_folder_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.delenv("FINEGRID_PIXELS", raising=False)
    assert str(os.getuid()) in pixels_cache.home().name
    monkeypatch.setenv("FINEGRID_PIXELS", str(tmp_path / "mine"))
    assert PixelStore(MB).root == tmp_path / "mine" / f"finegrid-pixels-{os.getuid()}"
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="another user"):
        PixelCache(PixelStore(MB), str(many(tmp_path / "rows")), recipe_from_json(SQUARE))


def test_a_broken_image_is_the_same_error(tmp_path, store):
    from datasets_ray.errors import UserError

    write_rows([row("torn", images=[picture(4, cut=200)], messages=chats(2)[1]["messages"])], tmp_path / "torn")
    for _ in range(2):
        with pytest.raises(UserError, match="torn"):
            collect([tmp_path / "torn"], SQUARE, store)


@pytest.mark.slow
def test_ray_data_writes_the_slots_that_the_consumer_reads(directories, store, monkeypatch):
    ray = pytest.importorskip("ray")
    plain, stats, _ = collect(directories, epochs=2)
    monkeypatch.setattr(streaming, "HEAD_BYTES", 0)  # not the consumer's own thread
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        first = collect(directories, SQUARE, store, epochs=2)
        later = collect(directories, SQUARE, store, epochs=2)
        off = collect(directories, epochs=2)
    finally:
        ray.shutdown()
    for steps, counts_of_rows, _ in (first, later, off):
        assert same_steps(steps, plain)
        assert counts_of_rows == stats
    assert first[2]["made"] >= IMAGES  # two tasks may make one image
    assert first[2]["made"] + first[2]["found"] == stats.images
    assert later[2] == counted(found=stats.images)
