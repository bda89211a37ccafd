"""Pipelines: a plain loop and Ray Data give the same micro-batches, from any step on, and ranks share a step out exactly."""

from __future__ import annotations

import io
import threading
import time
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

from datasets_ray import fitted, pipeline, streaming
from datasets_ray.encoding import Encoding, Stats
from datasets_ray.errors import UserError
from datasets_ray.kept import Kept
from datasets_ray.packing import Batch, Pack
from datasets_ray.pipeline import image_batches, index_of, train_batches
from datasets_ray.rows import row, write_rows
from datasets_ray.tokens import IGNORE, IMAGE_ID

SQUARE = {"kind": "square", "size": 16, "patch": 8, "fit": "pad"}
NATIVE = {"kind": "native", "patch": 4, "merge": 2, "min_pixels": 64, "max_pixels": 1024}


def picture(seed: int, cut: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, rng.integers(12, 40, 2).tolist() + [3], dtype=np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue()[: -cut or None]}


def chats(count: int, offset: int = 0) -> list[dict]:
    rows = []
    for i in range(offset, offset + count):
        words = " ".join(["a lumora"] * (i % 7 + 1))
        with_image = i % 3 != 0
        ask = ("<image>\n" if with_image else "") + f"What is number {i}?"
        messages = [{"role": "user", "text": ask}, {"role": "assistant", "text": words}]
        rows.append(row(f"r{i}", images=[picture(i)] if with_image else [], messages=messages))
    return rows


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    write_rows(chats(30), root / "a")
    write_rows(chats(17, 30), root / "b")
    return [root / "a", root / "b"]


@pytest.fixture(scope="module")
def ray_running():
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


def vlm(image: dict | None = SQUARE, **more) -> Encoding:
    usual = {"tokenizer": "tiny-llama", "template": "vicuna_v1", "max_tokens": 200, "streams": {"text": "conversation"}}
    return Encoding.of(image=image, **{**usual, **more})


def equal(one: Batch, two: Batch) -> bool:
    def same(a: Pack, b: Pack) -> bool:
        for field in fields(Pack):
            left, right = getattr(a, field.name), getattr(b, field.name)
            if isinstance(left, list):
                if len(left) != len(right) or not all(np.array_equal(x, y) for x, y in zip(left, right)):
                    return False
            elif not np.array_equal(left, right):
                return False
        return True

    return (one.samples, one.valid) == (two.samples, two.valid) and all(same(one.streams[k], two.streams[k]) for k in one.streams)


def collect(*arguments, **more) -> tuple[list[list[Batch]], Stats]:
    with train_batches(*arguments, **more) as stream:
        return list(stream), stream.stats


def same_steps(one: list[list[Batch]], two: list[list[Batch]]) -> bool:
    return [len(s) for s in one] == [len(s) for s in two] and all(equal(a, b) for x, y in zip(one, two) for a, b in zip(x, y))


@pytest.mark.parametrize("image", [SQUARE, NATIVE], ids=["square", "native"])
def test_steps_hold_their_rows_and_start_anywhere(directories, image):
    index = index_of(directories, 8, epochs=1.5, seed=3, order="modality_grouped")
    whole, stats = collect(directories, vlm(image), index, micro_tokens=300)
    assert len(whole) == len(index) == 9
    assert stats.samples == stats.rows == 71
    assert not stats.dropped
    for step, batches in enumerate(whole):
        numbers = np.concatenate([batch.streams["text"].sample for batch in batches])
        assert sorted(numbers) == list(range(len(index[step])))
        learned = sum(int((batch.streams["text"].labels != IGNORE).sum()) for batch in batches)
        assert all(batch.valid_tokens == learned and batch.samples == len(index[step]) for batch in batches)
        for batch in batches:
            text = batch.streams["text"]
            tokens = [16 // 8 * 16 // 8] if image is SQUARE else (text.grids.prod(1) // 4).tolist()
            assert len(text.image_slots) == (len(text.images) * tokens[0] if image is SQUARE else sum(tokens))
            starts = np.cumsum(text.lengths) - text.lengths
            assert (text.labels[starts] == IGNORE).all()
    for start in (1, 5, 8):
        again, _ = collect(directories, vlm(image), index, start, micro_tokens=300)
        assert same_steps(again, whole[start:])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_a_step_out_exactly(directories, world):
    index = index_of(directories, 16, epochs=1, seed=0)
    alone, _ = collect(directories, vlm(), index, micro_tokens=10_000)
    ranks = [collect(directories, vlm(), index, 0, rank, world, 250) for rank in range(world)]
    assert len({str(stats.to_json()) for _, stats in ranks}) == 1
    for step, (whole,) in enumerate(alone):
        parts = [steps[step] for steps, _ in ranks]
        assert len({len(batches) for batches in parts}) == 1
        assert all((b.samples, b.valid_tokens) == (whole.samples, whole.valid_tokens) for batches in parts for b in batches)
        assert segments(whole) == {number: one for batches in parts for b in batches for number, one in segments(b).items()}


def segments(batch: Batch) -> dict[int, tuple[bytes, bytes, bytes]]:
    """Sample number → ids, labels and pixels."""
    text = batch.streams["text"]
    ends, image_ends = np.cumsum(text.lengths), np.cumsum(text.image_counts)
    cut = lambda array, ends, sizes, at: np.ascontiguousarray(array[ends[at] - sizes[at] : ends[at]]).tobytes()
    return {
        int(number): (
            cut(text.ids, ends, text.lengths, at),
            cut(text.labels, ends, text.lengths, at),
            cut(text.images, image_ends, text.image_counts, at),
        )
        for at, number in enumerate(text.sample)
    }


def test_more_ranks_than_samples_gives_empty_packs(directories):
    index = index_of(directories[:1], 2, steps=1)
    batches = [collect(directories[:1], vlm(), index, 0, rank, 4, 500)[0][0] for rank in range(4)]
    assert [len(b) for b in batches] == [1, 1, 1, 1]
    assert sorted(b[0].streams["text"].lengths.size for b in batches) == [0, 0, 1, 1]
    assert all(b[0].samples == 2 for b in batches)


def test_two_streams_over_the_same_samples(directories):
    pairs = directories[0].parent / "pairs"
    write_rows([one for one in chats(24) if one["images"]], pairs)
    encoding = vlm(template="plain", max_tokens=9, streams={"image": "image", "text": "caption"})
    steps, stats = collect([pairs], encoding, index_of([pairs], 8, epochs=1), micro_tokens=40)
    assert stats.truncated > 0
    for batches in steps:
        for batch in batches:
            image, text = batch.streams["image"], batch.streams["text"]
            assert np.array_equal(image.sample, text.sample)
            assert image.tokens == 0
            assert len(image.images) == len(image.lengths) == len(image.sample)
            assert (text.labels == IGNORE).all()
            ends = np.cumsum(text.lengths)
            assert (text.ids[ends - 1] == 2).all()  # </s>, also where the caption was cut
            assert (text.ids[ends - text.lengths] == 1).all()
            assert text.lengths.max() <= 9
    word = "In one word:"
    prompted = vlm(streams={"image": {"kind": "image_prompt", "text": word}, "caption": {"kind": "caption_prompt", "text": word}})
    batch = collect([pairs], prompted, index_of([pairs], 4, steps=1))[0][0][0]
    assert (batch.streams["image"].ids == IMAGE_ID).sum() == 4 * 4
    assert (batch.streams["caption"].ids == IMAGE_ID).sum() == 0


def test_nothing_is_lost_silently(tmp_path):
    good = chats(6)
    bad = [
        row("header", images=[{"bytes": b"nonsense"}], messages=good[1]["messages"]),
        row("file", images=[{"path": "../../etc/passwd"}], messages=good[1]["messages"]),
        row("count", images=[picture(1), picture(2)], messages=good[1]["messages"]),
        row("turns", messages=[{"role": "user", "text": "a"}, {"role": "user", "text": "b"}]),
        row("long", images=[picture(3)], messages=[{"role": "user", "text": "x " * 300 + "<image>"}, {"role": "assistant", "text": "y"}]),
        row("unlearned", messages=[{"role": "user", "text": "x " * 300}, {"role": "assistant", "text": "y"}]),
    ]
    write_rows(good + bad, tmp_path, root=str(tmp_path))
    index = index_of([tmp_path], 12, epochs=1, seed=0)
    (batches,), stats = collect([tmp_path], vlm(template="qwen2_vl", tokenizer="tiny-qwen2"), index)
    assert stats.rows == 12
    assert stats.samples == batches[0].samples == 7
    assert stats.unlearned == 1
    assert stats.truncated == 1
    assert sum(stats.dropped.values()) == 5
    assert {stats.examples[reason] for reason in stats.dropped} == {"header", "file", "count", "turns", "long"}
    assert Stats.from_json(stats.to_json()) == stats
    stats.check(0.5)
    with pytest.raises(UserError, match="dropped"):
        stats.check(0.1)
    # a sound header with broken pixels is found too late to drop the row on every rank: an error that names it
    write_rows([row("torn", images=[picture(4, cut=200)], messages=good[1]["messages"])], tmp_path / "torn")
    with pytest.raises(UserError, match="torn"):
        collect([tmp_path / "torn"], vlm(), index_of([tmp_path / "torn"], 1, epochs=1))


def questions(directory, count: int = 11) -> None:
    asked = {"question": "What is it?", "options": ["lumora", "bivon"], "answer": "A", "label": "lumora"}
    rows = [row(f"q{i}", images=[picture(i)], **asked) for i in range(count)]
    rows.insert(4, row("broken", images=[picture(4, cut=200)], **asked))
    write_rows(rows, directory)


def test_images_for_embedding(tmp_path):
    questions(tmp_path)
    stream = image_batches(tmp_path, vlm().image, 5)
    batches = list(stream)
    halves = [list(image_batches(tmp_path, vlm().image, 5, rank=rank, world=2)) for rank in range(2)]
    assert sorted(n for half in halves for b in half for n in b.numbers.tolist()) == [0, 1, 2, 3, *range(5, 12)]
    assert [n for b in batches for n in b.numbers.tolist()] == [0, 1, 2, 3, *range(5, 12)]
    assert all(b.images.shape == (len(b.ids), 16, 16, 3) for b in batches)
    assert stream.stats.dropped == {"image cut short": 1}


def test_what_is_remembered_is_what_would_be_made(directories, monkeypatch):
    index = index_of(directories, 8, epochs=2, seed=4)
    monkeypatch.setattr(pipeline, "RECORDS", Kept(1 << 30))
    monkeypatch.setattr(fitted, "PIXELS", Kept(1 << 30))
    warm = [collect(directories, vlm(), index)[0] for _ in range(2)][1]
    other = collect(directories, vlm(template="llama_2"), index)[0]
    assert pipeline.RECORDS.nbytes > 0
    assert fitted.PIXELS.nbytes > 0
    monkeypatch.setattr(pipeline, "RECORDS", Kept(0))
    monkeypatch.setattr(fitted, "PIXELS", Kept(0))
    assert same_steps(warm, collect(directories, vlm(), index)[0])
    assert same_steps(other, collect(directories, vlm(template="llama_2"), index)[0])


def test_memory_is_bounded():
    kept: Kept[int] = Kept(10)
    for key in range(5):
        kept.put(key, key, 4)
        kept.get(0)
    assert kept.nbytes == 8
    assert [key for key in range(5) if kept.get(key) is not None] == [0, 4]
    kept.put("large", 1, 11)
    assert kept.get("large") is None


def test_a_stream_can_be_left_early(directories):
    index = index_of(directories, 4, epochs=4)
    stream = train_batches(directories, vlm(), index)
    next(stream)
    stream.close()
    assert not stream._thread.is_alive()
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.stats.rows == 4


@pytest.mark.slow
@pytest.mark.parametrize("head", [0, 20 << 20, 1 << 40], ids=["Ray Data alone", "after a thread's start", "a thread alone"])
def test_ray_data_gives_what_the_plain_loop_gives(directories, tmp_path, request, monkeypatch, head):
    index = index_of(directories, 8, epochs=2, seed=1)
    monkeypatch.setattr(streaming, "_ray_runs", lambda: False)
    plain = {
        (start, rank, world): collect(directories, vlm(NATIVE), index, start, rank, world, 300)
        for start, rank, world in [(0, 0, 1), (7, 1, 2)]
    }
    questions(tmp_path)
    pictures = list(image_batches(tmp_path, vlm().image, 5))
    write_rows([row("torn", images=[picture(4, cut=200)], messages=chats(2)[1]["messages"])], tmp_path / "torn")
    monkeypatch.undo()
    monkeypatch.setattr(streaming, "HEAD_BYTES", head)
    request.getfixturevalue("ray_running")
    for (start, rank, world), (steps, stats) in plain.items():
        streamed, counted = collect(directories, vlm(NATIVE), index, start, rank, world, 300)
        assert same_steps(streamed, steps)
        assert counted == stats
    with image_batches(tmp_path, vlm().image, 5) as stream:
        again = list(stream)
    assert [b.ids for b in again] == [b.ids for b in pictures]
    assert all(np.array_equal(a.images, b.images) for a, b in zip(again, pictures))
    with pytest.raises(UserError, match="torn"):  # as itself, not wrapped by Ray
        collect([tmp_path / "torn"], vlm(), index_of([tmp_path / "torn"], 1, epochs=1))
    early = train_batches(directories, vlm(NATIVE), index)
    next(early)
    early.close()
    assert not early._thread.is_alive()


@pytest.mark.parametrize("step_bytes", [1, 100 << 10, 1 << 20, 5 << 20, 100 << 20])
def test_tasks_are_small_at_both_ends_and_few(step_bytes):
    for steps in (1, 2, 5, 48, 700, 5198):
        sizes = streaming._sizes(steps, step_bytes, 2)
        assert sum(sizes) == steps
        assert min(sizes) >= 1
        small = max(1, min(streaming.MOST_STEPS, streaming.TASK_BYTES // step_bytes))
        assert sizes[0] == min(small, steps)
        assert sizes[-1] <= small
        assert max(sizes) <= max(small, streaming.LARGE_BYTES // step_bytes, -(-steps // streaming.BLOCKS))
        assert len(sizes) <= 1.5 * streaming.BLOCKS
        grown = sizes[: sizes.index(max(sizes)) + 1]
        assert grown == sorted(grown)
        assert sizes[len(grown) :] == sorted(sizes[len(grown) :], reverse=True)


def test_a_thread_helps_while_ray_data_is_behind(monkeypatch):
    """Whoever is first with a step, each comes once and in order; an error of either side reaches the consumer."""
    steps = [np.full(1, number) for number in range(40)]
    made: list[int] = []

    def task(numbers: np.ndarray) -> tuple[int, Stats]:
        made.append(int(numbers[0]))
        if len(made) == 10:
            begun.set()
        time.sleep(0.1 if len(made) > 20 else 0.001)
        return int(numbers[0]), Stats(rows=1)

    def late(task, steps, name, workers, step_bytes):
        """Ray Data that starts late and is quick then."""
        begun.wait(20)
        for numbers in steps:
            if broken and numbers[0] == 35:
                raise UserError("step 35")
            yield int(numbers[0]), Stats(rows=1)

    monkeypatch.setattr(streaming, "_ray_runs", lambda: True)
    monkeypatch.setattr(streaming, "_ray", late)
    broken, begun = False, threading.Event()
    with streaming.Stream(task, steps, name="late", step_bytes=streaming.HEAD_BYTES // 4) as stream:
        assert list(stream) == list(range(40))
        assert stream.stats.rows == 40
    assert made == list(range(len(made)))
    assert 10 <= len(made) < 40
    broken = True
    made.clear()
    failing = streaming.Stream(task, steps, name="late", step_bytes=streaming.HEAD_BYTES // 4)
    with failing, pytest.raises(UserError, match="step 35"):
        list(failing)
