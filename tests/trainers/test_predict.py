"""Prediction: batched answers are the one-by-one answers, nothing is lost on the way, nothing is done twice."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

from datasets_ray import streaming
from datasets_ray.errors import UserError
from datasets_ray.images import recipe_from_json
from datasets_ray.prompts import generation_prompt
from datasets_ray.questions import Pixels
from datasets_ray.rows import RowTable, write_rows
from datasets_ray.tokens import encode, end_id, load_tokenizer
from tests.trainers import evaluation_kit as kit
from trainers import answering, loaded, predict
from trainers.batch import TensorPack
from trainers.context import Context, Interrupted
from trainers.models import build

COUNT = 150


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """150 questions, ten without an image, and a VLM that answers in many ways."""
    folder = tmp_path_factory.mktemp("world")
    asked = kit.questions(folder / "asked", COUNT, text_only=10)
    model = kit.talkative(folder / "talkative")
    return {"inputs": {"asked": asked, "talkative": folder / "talkative"}, "model": model}


def spec_of(world: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "model": world["model"], "questions": "asked", "image": kit.IMAGE, "suffix": kit.SUFFIX, "method": "generate", "max_new_tokens": 8,
        "precision": "fp32", **changes,
    }  # fmt: skip


def predicted(world: dict[str, Any], folder: Path, batch: int = 64, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]], Context]:
    spec = spec_of(world, **changes)
    ctx = Context.local(folder, {"id": "p", "spec": spec, "runtime": {"eval_batch": batch}}, world["inputs"])
    summary = predict.run(spec, ctx)
    return summary, parquet.read_table(ctx.out / "predictions.parquet").to_pylist(), ctx


@torch.no_grad()
def one_by_one(world: dict[str, Any], tmp_path: Path, limit: int = 8) -> list[tuple[str, bool]]:
    """Greedy decoding without a cache of keys and values: the whole sequence read again for every token, one question at a time."""
    spec = spec_of(world)
    model = build(world["model"], Context.local(tmp_path / "one", {"id": "p", "spec": spec}, world["inputs"]), image=kit.IMAGE)
    tokenizer = load_tokenizer(kit.TOKENIZER)
    end = end_id("vicuna_v1", tokenizer)
    rows = RowTable(world["inputs"]["asked"])
    pixels = Pixels(rows, recipe_from_json(kit.IMAGE))
    answers = []
    for index, row in enumerate(rows):
        rendered = generation_prompt(row, "vicuna_v1", kit.SUFFIX, bos=tokenizer.bos_token, eos=tokenizer.eos_token)
        encoded = encode(rendered, tokenizer, [4] * len(row["images"]), 4096)
        images = torch.from_numpy(np.stack(pixels.of(index))) if row["images"] else None
        ids, finished = torch.from_numpy(encoded.ids), False
        for _ in range(limit):
            pack = TensorPack(
                segments=1, sample=torch.zeros(1, dtype=torch.long), lengths=torch.tensor([len(ids)]), ids=ids,
                positions=torch.arange(len(ids)), images=images, image_slots=torch.from_numpy(encoded.image_slots),
            )  # fmt: skip
            following = int(model.logits(model.hidden(pack)[-1:]).argmax())
            if following == end:
                finished = True
                break
            ids = torch.cat([ids, torch.tensor([following])])
        answers.append((tokenizer.decode(ids[len(encoded.ids) :].tolist(), skip_special_tokens=True).strip(), finished))
    return answers


def test_batched_answers_are_the_one_by_one_answers(world: dict[str, Any], tmp_path: Path) -> None:
    summary, rows, ctx = predicted(world, tmp_path)
    wanted = one_by_one(world, tmp_path)
    assert [(r["text"], r["finished"]) for r in rows] == wanted
    assert len({text for text, _ in wanted}) > 5, "the model says various things"
    assert 0 < sum(finished for _, finished in wanted) < COUNT, "some answers end, some go on"
    for batch in (1, 7):
        assert predicted(world, tmp_path / str(batch), batch)[1] == rows
    assert summary["n"] == COUNT and summary["finished"] == sum(f for _, f in wanted) / COUNT


def test_images_of_their_own_size_don_t_see_their_neighbours(world: dict[str, Any], tmp_path: Path) -> None:
    """Qwen2-VL: M-RoPE positions and images of several sizes in one pack."""
    model = kit.talkative(tmp_path / "talkative", kit.qwen2_vl_spec(), kit.NATIVE_IMAGE)
    native = {"model": model, "inputs": {**world["inputs"], "talkative": tmp_path / "talkative"}}
    summary, rows, _ = predicted(native, tmp_path / "batched", image=kit.NATIVE_IMAGE)
    assert predicted(native, tmp_path / "alone", batch=1, image=kit.NATIVE_IMAGE)[1] == rows
    assert len({row["text"] for row in rows}) > 5 and 0 < summary["finished"] < 1


def test_every_question_is_kept_in_order_with_its_prompt(world: dict[str, Any], tmp_path: Path) -> None:
    _, rows, ctx = predicted(world, tmp_path)
    asked = list(RowTable(world["inputs"]["asked"]))
    kept = ["id", "options", "answer", "label", "meta"]
    assert list(rows[0]) == ["id", "prompt", "options", "answer", "label", "meta", "text", "finished"]
    for row, question in zip(rows, asked, strict=True):
        assert [row[name] for name in kept] == [question[name] for name in kept]
        assert row["prompt"].count("<image>") == len(question["images"])
        assert f"A. {row['options'][0]}\nB. {row['options'][1]}" in row["prompt"] and row["prompt"].endswith(f"{kit.SUFFIX} ASSISTANT:")
    manifest = json.loads((ctx.out / "manifest.json").read_text())
    assert manifest["questions"] == "asked" and manifest["max_new_tokens"] == 8 and manifest["dropped"] == {}


def test_the_limit_of_new_tokens_only_cuts(world: dict[str, Any], tmp_path: Path) -> None:
    long, short = (predicted(world, tmp_path / str(n), max_new_tokens=n)[1] for n in (8, 2))
    assert all(a["text"].startswith(b["text"]) for a, b in zip(long, short))
    assert all(a["finished"] for a, b in zip(long, short) if b["finished"])
    assert sum(r["finished"] for r in short) < sum(r["finished"] for r in long)


def test_an_interrupted_stage_goes_on_from_its_parts(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = predicted(world, tmp_path / "whole")
    spec = spec_of(world)
    stage = {"id": "p", "spec": spec, "runtime": {"eval_batch": 64}}
    stopped = Context.local(tmp_path / "stopped", stage, world["inputs"], stopping=lambda step: step == 1)
    with pytest.raises(Interrupted, match="64 answers"):
        predict.run(spec, stopped)
    assert not (stopped.out / "predictions.parquet").exists()
    asked_again: list[int] = []
    answer = predict.Answerer.answer

    def counting(self: predict.Answerer, chunk: np.ndarray) -> Any:
        asked_again.extend(chunk.tolist())
        return answer(self, chunk)

    monkeypatch.setattr(predict.Answerer, "answer", counting)
    (stopped.work / "answers" / "0-999.parquet").write_bytes(b"PAR1 torn")
    summary = predict.run(spec, Context.local(tmp_path / "stopped", stage, world["inputs"]))
    assert len(asked_again) == COUNT - 64
    assert {**summary, "threshold": whole[0]["threshold"]} == whole[0], "what is measured anew is the threshold"
    assert (stopped.out / "predictions.parquet").read_bytes() == (whole[2].out / "predictions.parquet").read_bytes()


def test_a_lost_lease_writes_nothing(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "FLUSH_SECONDS", 0.0)
    spec = spec_of(world)

    def lost() -> None:
        raise RuntimeError("lease lost")

    ctx = Context.local(tmp_path, {"id": "p", "spec": spec, "runtime": {"eval_batch": 64}}, world["inputs"], guard=lost)
    with pytest.raises(RuntimeError, match="lease lost"):
        predict.run(spec, ctx)
    assert not list(ctx.work.rglob("*.parquet")) and not list(ctx.out.iterdir())


def test_a_model_and_an_image_are_loaded_once(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    monkeypatch.setattr(loaded, "build", lambda *a, **k: built.append(a) or build(*a, **k))
    first = predicted(world, tmp_path / "a")[2]
    other = {**spec_of(world), "suffix": "Say the letter."}
    ctx = Context.local(tmp_path / "b", {"id": "p2", "spec": other}, world["inputs"], cache=first.cache)
    decoded: list[int] = []
    monkeypatch.setattr("datasets_ray.questions.pixels", lambda *a: decoded.append(1))
    predict.run(other, ctx)
    assert len(built) == 1 and not decoded
    # another arm with the same tokenizer pays for its weights only, and its weights replace the others
    arm = {**other, "model": {**world["model"], "parts": {**world["model"]["parts"], "connector": kit.fresh({"depth": 2}, "mlp", 9)}}}
    monkeypatch.setattr(predict, "prepare", lambda *a, **k: pytest.fail("prompts were made before"))
    predict.run(arm, Context.local(tmp_path / "c", {"id": "p3", "spec": arm}, world["inputs"], cache=first.cache))
    assert len(built) == 2 and not decoded
    assert len([key for key in first.cache._items if key.startswith("model:")]) == 1


def test_unreadable_images_are_counted_up_to_a_share(world: dict[str, Any], tmp_path: Path) -> None:
    one = {**world, "inputs": {**world["inputs"], "asked": kit.questions(tmp_path / "one", COUNT, broken=1)}}
    summary, rows, _ = predicted(one, tmp_path / "p1")
    assert summary["dropped"] == {"image unreadable": 1} and [r["id"] for r in rows] == [f"q{i}" for i in range(1, COUNT)]
    several = {**world, "inputs": {**world["inputs"], "asked": kit.questions(tmp_path / "several", COUNT, broken=2)}}
    with pytest.raises(UserError, match="2 of 150 questions can't be asked"):
        predicted(several, tmp_path / "p2")


def test_mistakes_are_named(world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown prediction method 'first_tokens'\n.*did you mean 'first_token'"):
        predicted(world, tmp_path / "m", method=["likelihood", "first_tokens"])
    with pytest.raises(UserError, match=r"no prediction method\n.*generate, first_token, likelihood"):
        predicted(world, tmp_path / "n", method=[])
    write_rows([], tmp_path / "none")
    with pytest.raises(UserError, match=r"a question set without questions .*n = 0"):
        predicted({**world, "inputs": {**world["inputs"], "asked": tmp_path / "none"}}, tmp_path / "o")
    with pytest.raises(UserError, match="140 questions show images"):
        predicted(world, tmp_path / "i", image=None)


def test_large_sets_are_decoded_by_the_stream(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray Data would run, run by a thread: the same answers, the same reasons, nothing kept in this process."""
    one = {**world, "inputs": {**world["inputs"], "asked": kit.questions(tmp_path / "one", COUNT, text_only=10, broken=1)}}
    plain = predicted(one, tmp_path / "plain")
    monkeypatch.setattr(answering, "STREAMED_ROWS", COUNT)
    monkeypatch.setattr(answering, "KEPT_BYTES", 0)
    tasks: list[Any] = []

    class Streamed(streaming.Stream):  # type: ignore[type-arg]
        def __init__(self, task: Any, steps: Any, **names: Any) -> None:
            monkeypatch.setattr(streaming, "_ray_runs", lambda: False)
            tasks.append(pickle.loads(pickle.dumps(task)))
            super().__init__(tasks[-1], steps, **names)

    monkeypatch.setattr(streaming, "_ray_runs", lambda: True)
    monkeypatch.setattr(streaming, "Stream", Streamed)
    summary, rows, ctx = predicted(one, tmp_path / "streamed", batch=20)
    assert len(tasks) == 1 and rows == plain[1] and summary["dropped"] == {"image unreadable": 1}
    assert not next(value for key, (value, _) in ctx.cache._items.items() if key.startswith("pixels:"))._kept


@pytest.mark.slow
def test_two_ranks_answer_as_one(world: dict[str, Any], tmp_path: Path) -> None:
    whole = predicted(world, tmp_path / "whole")
    spec = spec_of(world)
    stage = {"id": "p", "spec": spec, "runtime": {"eval_batch": 64}}
    torch.multiprocessing.spawn(_rank, (stage, world["inputs"], str(tmp_path)), nprocs=2)
    merged = parquet.read_table(tmp_path / "shared" / "out" / "predictions.parquet").to_pylist()
    assert merged == whole[1]
    shares = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(COUNT)) and min(map(len, shares)) > 0


def _rank(rank: int, stage: dict[str, Any], inputs: dict[str, Path], folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    ctx = Context.local(Path(folder) / "shared", stage, inputs, rank=rank, world=2)
    mine: list[int] = []
    answer = predict.Answerer.answer

    def noting(self: predict.Answerer, chunk: np.ndarray) -> Any:
        mine.extend(int(row) for row in chunk)
        return answer(self, chunk)

    predict.Answerer.answer = noting  # type: ignore[method-assign]
    predict.run(stage["spec"], ctx)
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(mine))
    dist.destroy_process_group()
