"""Exports: an arm of a run directory as a Hugging Face model that plain transformers loads, with the same numbers, pixels and answers."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file

from datasets_ray.answers import LETTERS
from datasets_ray.errors import UserError
from datasets_ray.images import recipe_from_json
from datasets_ray.packing import Batch, Segment, pack
from datasets_ray.questions import Pixels, prepare, question_pack
from datasets_ray.rows import RowTable, row, write_rows
from datasets_ray.tokens import IGNORE, end_id, load_tokenizer
from tests.trainers import evaluation_kit as kit
from trainers import export, predict
from trainers.batch import to_device
from trainers.context import Context
from trainers.models import build, save_part, train_parts
from trainers.models.qwen2_vl import patchify
from trainers.objectives.next_token import NextToken

SQUARE = {"kind": "square", "size": 16, "patch": 8, "fit": "pad", "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
TRAINED = "train-0001"
QWEN2 = {**kit.LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}


def arm_spec(llm: str) -> dict[str, Any]:
    """A vlm as the grid composes it: open_clip encoder with quick-GELU and narrow heads (DFN), MLP, Llama or Qwen2."""
    spec = kit.vlm_spec()
    spec["parts"]["encoder"]["config"] = {
        **kit.CLIP,
        "quick_gelu": True,
        "vision_cfg": {**kit.CLIP["vision_cfg"], "layers": 3, "head_width": 8},
    }
    if llm == "qwen2":
        spec["parts"]["llm"]["config"] = QWEN2
        spec |= {"tokenizer": "tiny-qwen2", "template": "chatml"}
    return spec


def quiz(folder: Path, count: int, text_only: int) -> Path:
    """Which colour, five options in one order; the last rows show no image and are answered C."""
    names, rows = sorted(kit.COLOURS), []
    for i in range(count):
        shown = i < count - text_only
        label = names[i % 5] if shown else names[2]
        words = " ".join(["please"] * (i % 4))
        fields = {"question": f"Which colour is this? {words}", "options": names, "answer": LETTERS[names.index(label)], "label": label}
        rows.append(row(f"q{i}", images=[{"bytes": kit.square(label, i)}] if shown else [], **fields))
    write_rows(rows, folder, classes=names)
    return folder


def finished_arm(out: Path, spec: dict[str, Any], image: dict[str, Any], asked: Path, steps: int) -> dict[str, Any]:
    """A run directory as grid.run leaves it, with one arm that learned to answer for a few steps. Returns the arm's predict spec."""
    store = out / "store"
    folder = store / TRAINED
    folder.mkdir(parents=True)
    model = build(spec, Context.local(out / "building", {"id": TRAINED, "spec": {}}), image=image)
    rows, recipe = RowTable(asked), recipe_from_json(image)
    prompts, pixels = prepare(rows, spec["tokenizer"], spec["template"], recipe, kit.SUFFIX), Pixels(rows, recipe)
    tokenizer = load_tokenizer(spec["tokenizer"])
    end = end_id(spec["template"], tokenizer)
    said = [[tokenizer(f" {one['answer']}", add_special_tokens=False)["input_ids"][-1], end] for one in rows]
    train_parts(model, {"connector", "llm"})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    draws = np.random.default_rng(0)
    for _ in range(steps):
        chosen = [int(i) for i in draws.integers(0, len(rows), 10)]
        segments = []
        for at in chosen:
            one = prompts.encoded[at]
            assert one is not None
            grids = np.array([[1, layout.grid_h, layout.grid_w] for layout in prompts.layouts[at]], dtype=np.int64).reshape(-1, 3)
            ids = np.concatenate([one.ids, said[at]])
            labels = np.concatenate([np.full(len(one.ids), IGNORE), said[at]])
            segments.append(Segment(ids, labels, tuple(pixels.of(at)), grids, len(ids)))
        batch = Batch({"text": pack(segments, range(10), (16, 16) if recipe.uniform else None)}, 10, 20)
        tensors = to_device(batch, "cpu").streams["text"]
        NextToken().loss_sum(model, tensors, model.hidden(tensors)).div(20).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy(spec)
    for name in spec["parts"]:
        save_part(model, name, folder / f"{name}.safetensors")
        spec["parts"][name]["weights"] = {"stage": TRAINED}
    (folder / "DONE.json").write_text(json.dumps({"summary": {"loss": {"first": 4.0, "last": 2.0, "last_tenth": 2.0}}}))
    predicted = {
        "model": spec, "questions": "asked", "image": image, "suffix": kit.SUFFIX, "method": "generate", "max_new_tokens": 8,
        "precision": "fp32",
    }  # fmt: skip
    training = {
        "model": before, "data": {"rows": ["dataset-1"]}, "phases": [{"until": 1.0, "learning_rates": {"connector": 0.003, "llm": 0.003}}],
        "steps": steps, "batch": 10, "schedule": "constant", "warmup": 0.0, "clip": None, "precision": "fp32", "seed": 0,
    }  # fmt: skip
    stages = [
        {"id": "dataset-1", "kind": "dataset", "name": "data quiz", "needs": [], "spec": {"source": "kit", "seed": 3}},
        {"id": TRAINED, "kind": "train", "name": "finetune row-12", "needs": ["dataset-1"], "spec": training},
        {"id": "predict-1", "kind": "predict", "name": "predict row-12 quiz", "needs": [TRAINED], "spec": predicted},
    ]
    entry = {
        "name": "row-12", "axes": {"encoder": "dfn", "llm": "tiny"}, "stages": [TRAINED, "predict-1"], "predictions": {"quiz": "predict-1"},
        "scores": {"quiz": "score-1"},
    }  # fmt: skip
    idle = {**entry, "name": "row-13", "predictions": {}}
    study = {"name": "ablation", "question": "Which?", "miniature": True}
    (out / "plan.json").write_text(json.dumps({"study": study, "arms": [entry, idle], "references": [], "stages": stages}))
    (out / "run.json").write_text(json.dumps({"store": "/moved/away", "drivers": [{"versions": {"torch": "2.x"}}]}))
    for name, content in (("dataset-1/manifest.json", {"rows": 90, "dropped": {"image unreadable": 2}}), ("score-1/scores.json", SCORES)):
        (store / name).parent.mkdir(parents=True)
        (store / name).write_text(json.dumps(content))
    return predicted


SAID = (
    "study `ablation`", "**A miniature**", "| encoder | dfn |", "**finetune row-12** on quiz: 120 steps, batch 10", "llm at 0.003",
    "| quiz | 90 | image unreadable: 2 | kit (seed 3) | dataset-1 |", "| quiz | 61.2 ± 2.5 | 100 | accuracy |", "**Unverified**",
    "torch 2.x",
)  # fmt: skip
"""What a card has to say."""
SCORES = {"value": 61.25, "stderr": 2.5, "n": 100, "metric": "accuracy"}
CASES = {
    "llama": (lambda: arm_spec("llama"), SQUARE), "qwen2": (lambda: arm_spec("qwen2"), {**SQUARE, "fit": "crop"}),
    "qwen2_vl": (kit.qwen2_vl_spec, kit.NATIVE_IMAGE),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def arm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished arm, its questions, what predict says, and its export."""
    out = tmp_path_factory.mktemp(request.param)
    asked = quiz(out / "asked", 100, text_only=8)
    make, image = CASES[request.param]
    spec = finished_arm(out, make(), image, asked, steps=60 if request.param == "qwen2_vl" else 120)
    ctx = Context.local(out / "p", {"id": "p", "spec": spec}, {"asked": asked, TRAINED: out / "store" / TRAINED})
    predict.run(spec, ctx)
    answers = parquet.read_table(ctx.out / "predictions.parquet").to_pylist()
    made = out / "exported"
    assert export.main([str(out / "row-12"), str(made), "--shard", "100KB"]) == 0
    return {"out": out, "asked": asked, "spec": spec, "answers": answers, "made": made, "name": request.param, "image": image, "ctx": ctx}


def picture(one: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(one["images"][0]["bytes"]))


def loaded(made: Path) -> tuple[Any, Any]:
    """With transformers alone, as its documentation does it."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(made, dtype="auto").eval(), AutoProcessor.from_pretrained(made)


def test_plain_transformers_gives_the_same_answers(arm: dict[str, Any]) -> None:
    model, processor = loaded(arm["made"])
    rows = list(RowTable(arm["asked"]))
    wanted = {answer["id"]: answer["text"] for answer in arm["answers"]}
    assert len(wanted) == 100 and len(set(wanted.values())) >= 3, "it says various things"
    assert all(answer["finished"] for answer in arm["answers"])
    for shown in (True, False):
        asked = [row for row in rows if bool(row["images"]) is shown]
        texts = [export.ask(processor, row, kit.SUFFIX) for row in asked]
        images = {"images": [[picture(row)] for row in asked]} if shown else {}
        inputs = processor(text=texts, padding=True, return_tensors="pt", **images)
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=8)
        said = processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert {row["id"]: text.strip() for row, text in zip(asked, said)} == {row["id"]: wanted[row["id"]] for row in asked}


def test_logits_and_prompts_are_ours(arm: dict[str, Any]) -> None:
    """One image, several, none: token by token, with the pixels that we make."""
    model, processor = loaded(arm["made"])
    spec, recipe = arm["spec"]["model"], recipe_from_json(arm["image"])
    folder = arm["out"] / "several"
    rows = list(RowTable(arm["asked"]))
    two = {**rows[0], "id": "two", "images": rows[0]["images"] + rows[1]["images"]}
    write_rows([rows[0], two, rows[-1]], folder)
    table = RowTable(folder)
    prompts, pixels = prepare(table, spec["tokenizer"], spec["template"], recipe, kit.SUFFIX), Pixels(table, recipe)
    ctx = Context.local(arm["out"] / "l", {"id": "l", "spec": {}}, {TRAINED: arm["out"] / "store" / TRAINED})
    ours = build(spec, ctx, image=arm["image"])
    for index, one in enumerate(table):
        images = [picture({"images": [image]}) for image in one["images"]]
        inputs = processor(text=export.ask(processor, one, kit.SUFFIX), images=images or None, return_tensors="pt")
        ids = inputs["input_ids"][0]
        encoded = prompts.encoded[index]
        assert encoded is not None and ids.tolist() == np.where(encoded.ids < 0, processor.image_token_id, encoded.ids).tolist()
        asked = question_pack(prompts, [pixels.of(index)], [index], recipe)
        tensors = to_device(Batch({"text": asked}, 1, 0), "cpu").streams["text"]
        if images:  # transformers' default resampling rounds otherwise: compared apart
            inputs["pixel_values"] = shown(ours, tensors)
        with torch.no_grad():
            theirs = model(**inputs).logits[0]
            made = ours.logits(ours.hidden(tensors))
        torch.testing.assert_close(made, theirs[:, : made.shape[1]], atol=1e-4, rtol=0)
        extra = theirs[:, made.shape[1] :]
        assert extra.shape[1] == 0 or float((extra.amax(-1) - made.amax(-1)).max()) < 0, "a grown row is never the answer"


def shown(model: Any, tensors: Any) -> torch.Tensor:
    """Our pixels in the model's layout."""
    if hasattr(model, "encoder"):
        return model.encoder.pixels(tensors.images)
    return torch.cat([patchify(i, model.patch, model.merge, model.temporal, model.mean, model.std) for i in tensors.images])


def test_the_directory_holds_what_readers_look_for(arm: dict[str, Any]) -> None:
    made: Path = arm["made"]
    config = json.loads((made / "config.json").read_text())
    listing = json.loads((made / "model.safetensors.index.json").read_text())
    names = {name for file in set(listing["weight_map"].values()) for name in load_file(made / file)}
    assert set(listing["weight_map"]) == names and len(set(listing["weight_map"].values())) > 1
    settings = json.loads((made / "generation_config.json").read_text())
    tokenizer = load_tokenizer(arm["spec"]["model"]["tokenizer"])
    end = "</s>" if arm["name"] == "llama" else "<|im_end|>"
    assert settings["eos_token_id"] == tokenizer.convert_tokens_to_ids(end) and settings["do_sample"] is False
    card = (made / "README.md").read_text()
    for said in SAID:
        assert said.replace("120", "60" if arm["name"] == "qwen2_vl" else "120") in card, said
    if arm["name"] == "qwen2_vl":
        assert config["architectures"] == ["Qwen2VLForConditionalGeneration"] and config["image_token_id"] == 1534
        assert {"visual.blocks.0.norm1.weight", "visual.merger.ln_q.weight", "model.layers.0.mlp.up_proj.weight"} <= names, "the hub's"
        assert config["text_config"]["rope_scaling"] == {"type": "mrope", "mrope_section": [4, 4, 4]}
        return
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert any(name.startswith("language_model.model.layers.0.") for name in names), "the hub's names"
    assert any(name.startswith("vision_tower.vision_model.encoder.layers.1.") for name in names)
    assert config["vision_config"]["hidden_act"] == "quick_gelu" and config["vision_feature_layer"] == -1
    assert config["vision_config"]["num_hidden_layers"] == 2, "the block above the penultimate layer is not made up"
    assert config["text_config"]["vocab_size"] == 1600 and config["image_token_index"] == 1536
    assert config["text_config"]["rope_theta"] == 10000.0 and ("language_model.lm_head.weight" in names) is (arm["name"] == "llama")
    image = json.loads((made / "preprocessor_config.json").read_text())
    assert image["do_pad"] is (arm["image"]["fit"] == "pad") and image["do_center_crop"] is (arm["image"]["fit"] == "crop")


def test_nothing_is_overwritten_and_mistakes_are_named(arm: dict[str, Any], tmp_path: Path) -> None:
    out = arm["out"]
    with pytest.raises(UserError, match="isn't empty"):
        export.main([str(out / "row-12"), str(arm["made"])])
    with pytest.raises(UserError, match=r"no arm 'row-1' in .*\n.*did you mean 'row-1"):
        export.main([str(out / "arms" / "row-1"), str(tmp_path / "x")])
    with pytest.raises(UserError, match=r"holds 2 arms\n.*name one: .*/row-12"):
        export.main([str(out), str(tmp_path / "x")])
    with pytest.raises(UserError, match="is no arm of a run"):
        export.main([str(tmp_path / "nothing"), str(tmp_path / "x")])
    with pytest.raises(UserError, match="is asked no questions about images"):
        export.main([str(out / "row-13"), str(tmp_path / "x")])
    done = out / "store" / TRAINED / "DONE.json"
    content = done.read_text()
    done.unlink()
    with pytest.raises(UserError, match="'finetune row-12', which isn't finished"):
        export.main([str(out / "row-12"), str(tmp_path / "x")])
    done.write_text(content)
    assert not list(tmp_path.iterdir()), "nothing is left of what failed"
