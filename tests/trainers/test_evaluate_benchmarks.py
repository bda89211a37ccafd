"""`python -m trainers.evaluate --benchmarks`: rows by the benchmark's file, answers that outlive a kill, zero-shot with a CLIP."""

from __future__ import annotations

import base64
import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

from datasets_ray.errors import UserError
from tests.datasets_ray.small_benchmarks import pets
from tests.trainers import evaluation_kit as kit
from trainers import evaluate, predict
from trainers.interchange.processors import tokenizer_with

PETS = ["Abyssinian", "beagle", "Bengal", "boxer", "pug", "Sphynx"]


def mmstar(root: Path, count: int = 200) -> Path:
    """MMStar's table with `count` rows about one image."""
    root.mkdir(parents=True, exist_ok=True)
    image = base64.b64encode(kit.square("red", 1)).decode()
    with (root / "MMStar.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "question", "A", "B", "C", "answer", "category", "image"])
        for number in range(count):
            question = "Which colour is this? " + "please " * (number % 7)
            writer.writerow([number, question, "red", "green", "blue", "ABC"[number % 3], "colour", image if number == 0 else 0])
    return root


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(a VLM's artefact, its image recipe as JSON)."""
    folder = tmp_path_factory.mktemp("store") / "talkative"
    kit.talkative(folder)
    return folder, json.dumps(kit.IMAGE)


class Counting:
    """Stands in for `predict.Answerer`: counts the rows asked, and is interrupted where told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: Counter[int] = Counter()
        self.stop_after: int | None = None
        real = predict.Answerer.answer
        counting = self

        def answer(answerer: Any, rows: Any) -> Any:
            if counting.stop_after is not None and sum(counting.asked.values()) >= counting.stop_after:
                raise KeyboardInterrupt
            made = real(answerer, rows)
            counting.asked.update(int(row) for row in rows)
            return made

        monkeypatch.setattr(predict.Answerer, "answer", answer)
        monkeypatch.setattr(predict, "FLUSH_SECONDS", 0.0)  # a chunk is on disk as soon as it is answered


def test_a_killed_evaluation_asks_only_what_is_missing(tmp_path: Path, talker: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model, recipe = talker
    root, counting = mmstar(tmp_path / "data"), Counting(monkeypatch)

    def run(*more: str, out: str = "out") -> int:
        common = ["--benchmarks", "mmstar", "--data-root", str(root), "--allow-subset", "--recipe", recipe, "--max-new-tokens", "2"]
        return evaluate.main([str(model), *common, "--out", str(tmp_path / out), *more])

    assert run(out="whole") == 0
    whole = parquet.read_table(tmp_path / "whole" / "mmstar" / "out" / "predictions.parquet")
    assert whole.num_rows == 200 == sum(counting.asked.values())

    counting.asked.clear()
    counting.stop_after = 100
    with pytest.raises(KeyboardInterrupt):
        run()
    first = set(counting.asked)
    assert 100 <= len(first) < 200 and not (tmp_path / "out" / "mmstar" / "out" / "scores.json").exists()
    counting.asked.clear()
    counting.stop_after = None
    assert run() == 0
    assert set(counting.asked) == set(range(200)) - first and max(counting.asked.values()) == 1
    assert f"mmstar: {len(first)} answers were there, the rest is asked" in capsys.readouterr().err
    assert parquet.read_table(tmp_path / "out" / "mmstar" / "out" / "predictions.parquet").equals(whole)

    # finished: nothing is asked again, and another rule only scores
    counting.asked.clear()
    assert run("--rule", "strict") == 0 and not counting.asked
    shown = capsys.readouterr()
    assert "answered before, nothing to ask" in shown.err and "(accuracy, generate, strict, n 200, chance 33.3" in shown.out

    # other options, other rows, other weights: nothing of the old answers is taken up
    counting.stop_after = 100
    with pytest.raises(KeyboardInterrupt):
        run("--suffix", "Say a letter.")
    counting.asked.clear()
    counting.stop_after = None
    assert run("--suffix", "Letter, please.") == 0 and len(counting.asked) == 200
    counting.asked.clear()
    mmstar(root, 90)
    assert run("--suffix", "Letter, please.") == 0 and len(counting.asked) == 90
    counting.asked.clear()
    (model / "llm.safetensors").touch()
    assert run("--suffix", "Letter, please.") == 0 and len(counting.asked) == 90
    assert "a subset: 90 of 1,500" in capsys.readouterr().err


def test_a_benchmark_says_its_prompt_rule_and_metric(tmp_path: Path, talker: Any) -> None:
    model, recipe = talker
    own = tmp_path / "mine.yaml"
    own.write_text("include: mmstar\nexpect: 12\nrule: strict\nmetric: mean_per_class\nsuffix: Just say it.\nmax_new_tokens: 2\n")
    common = [str(model), "--data-root", str(mmstar(tmp_path / "data", 12)), "--recipe", recipe, "--out", str(tmp_path / "out")]
    assert evaluate.main([*common, "--benchmarks", str(own)]) == 0
    scores = json.loads((tmp_path / "out" / "mine" / "out" / "scores.json").read_text())
    assert (scores["rule"], scores["metric"], scores["n"]) == ("strict", "mean_per_class", 12)
    prompts = parquet.read_table(tmp_path / "out" / "mine" / "out" / "predictions.parquet").column("prompt").to_pylist()
    assert all("\nC. blue\nJust say it." in prompt for prompt in prompts)
    with pytest.raises(UserError, match=r"12 records, its release has 1,500(.|\n)*allow_subset"):
        evaluate.main([*common, "--benchmarks", "mmstar"])
    wrong = {
        "did you mean 'mmstar'": ["--benchmarks", "mmstr"], "nothing to ask": [], "same directory name": ["--benchmarks", "pope,pope"],
        "needs a miner": ["--benchmarks", "flowers"], "a judge is an address and a model": ["--benchmarks", "pope", "--judge-model", "x"],
    }  # fmt: skip
    for said, more in wrong.items():
        with pytest.raises(UserError, match=said):
            evaluate.main([*common, *more])
    with pytest.raises(UserError, match="is no folder"):
        evaluate.main([str(model), "--benchmarks", "pope", "--data-root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])


def test_mined_options_come_from_the_miner(tmp_path: Path, talker: Any, capsys: Any) -> None:
    model, recipe = talker
    kit.clip_part(tmp_path / "clip")
    root = pets(tmp_path / "data", PETS, 4)
    common = ["--benchmarks", "pets", "--data-root", str(root), "--allow-subset", "--out", str(tmp_path / "out")]
    mined = ["--miner", str(tmp_path / "clip"), "--cache", str(tmp_path / "sets")]
    assert evaluate.main([str(model), *common, *mined, "--recipe", recipe, "--max-new-tokens", "2"]) == 0
    predictions = parquet.read_table(tmp_path / "out" / "pets" / "out" / "predictions.parquet").to_pylist()
    assert len(predictions) == 24 and {len(row["options"]) for row in predictions} == {5}
    assert all(row["options"]["ABCDE".index(row["answer"])] == row["label"] for row in predictions)
    assert "pets: 24 questions" in capsys.readouterr().err

    # a CLIP is scored over all classes, and among the same choices; the miner itself may not be
    kit.clip_part(tmp_path / "other", seed=9)
    assert evaluate.main([str(tmp_path / "other"), *common, *mined]) == 0
    shown = capsys.readouterr().out
    scores = json.loads((tmp_path / "out" / "pets" / "out" / "scores.json").read_text())
    assert scores["n"] == scores["among_choices_n"] == 24 and scores["classes"] == 6 and scores["value"] == 100 * scores["top1"]
    assert f"pets: top-1 {scores['value']:.1f}, top-5 {100 * scores['top5']:.1f}, mean per class " in shown and "among the choices" in shown
    with pytest.raises(UserError, match="the miner is the encoder of an arm"):
        evaluate.main([str(tmp_path / "clip"), *common, *mined])
    with pytest.raises(UserError, match="benchmark mmstar has no classes"):
        evaluate.main([str(tmp_path / "other"), "--benchmarks", "mmstar", *common[2:]])


def test_a_transformers_clip_classifies_without_questions(tmp_path: Path, capsys: Any) -> None:
    from transformers import SiglipConfig, SiglipModel

    folder, tokenizer = tmp_path / "hub", tokenizer_with(kit.TOKENIZER, [])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 12, "projection_size": 32}
    torch.manual_seed(0)
    SiglipModel(SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})).save_pretrained(folder)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    root = pets(tmp_path / "data", PETS, 2)
    common = ["--benchmarks", "pets", "--data-root", str(root), "--allow-subset", "--out", str(tmp_path / "out")]
    assert evaluate.main([str(folder), *common]) == 0
    scores = json.loads((tmp_path / "out" / "pets" / "out" / "scores.json").read_text())
    assert scores["n"] == 12 and scores["model"] == str(folder) and "among_choices" not in scores
    assert "pets: a subset" not in capsys.readouterr().out
