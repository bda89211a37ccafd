"""Released models through their own processors: batched answers are those of plain `generate` one by one, prompts are their families'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from datasets_ray.errors import UserError
from datasets_ray.images import decode
from datasets_ray.rows import RowTable, row, write_rows
from tests.trainers import evaluation_kit as kit
from tests.trainers.existing_kit import KINDS, released
from trainers import evaluate, existing, families, predict
from trainers.context import Context
from trainers.models import existing as models

COUNT, LIMIT = 24, 5


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of two to five options, three of them without an image."""
    return kit.questions(tmp_path_factory.mktemp("existing") / "asked", COUNT, text_only=3)


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, released(request.param, tmp_path_factory.mktemp("released") / request.param)


def spec_of(folder: Path, **changes: Any) -> dict[str, Any]:
    model = models.spec_of(str(folder))
    if model["prompts"]["name"] == "qwen2-vl":
        model["prompts"]["images_kwargs"] = {"size": {"shortest_edge": 64, "longest_edge": 1024}}  # a tiny model's limits
    common = {"questions": "asked", "image": None, "suffix": "", "method": "generate", "max_new_tokens": LIMIT, "precision": "fp32"}
    return {"model": model, **common, **changes}


def predicted(folder: Path, asked: Path, out: Path, batch: int, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    spec = spec_of(folder, **changes)
    ctx = Context.local(out, {"id": "p", "spec": spec, "runtime": {"eval_batch": batch}}, {"asked": asked})
    return predict.run(spec, ctx), parquet.read_table(ctx.out / "predictions.parquet").to_pylist()


def one_by_one(folder: Path, asked: Path, prompts: list[str], pad: bool) -> list[tuple[str, bool]]:
    """Plain transformers, batch 1, as its documentation shows it."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    answers, rows = [], RowTable(asked)
    for entry, prompt in zip(rows, prompts):
        images = [decode(image, rows.root) for image in entry["images"]]
        if pad:
            images = [_padded(image) for image in images]
        inputs = processor(text=[prompt], images=images or None, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            made = model.generate(**inputs, do_sample=False, repetition_penalty=1.0, max_new_tokens=LIMIT)
        ids = made[0, inputs["input_ids"].shape[1] :].tolist()
        end = processor.tokenizer.eos_token_id
        answers.append((processor.tokenizer.decode(ids, skip_special_tokens=True).strip(), end in ids))
    return answers


def _padded(image: Image.Image) -> Image.Image:
    """On a square of CLIP's mean colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in (0.48145466, 0.4578275, 0.40821073)))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def test_batches_answer_as_plain_transformers_one_by_one(checkpoint: tuple[str, Path], asked: Path, tmp_path: Path) -> None:
    kind, folder = checkpoint
    summary, rows = predicted(folder, asked, tmp_path / "batched", batch=16)
    prompts = [entry["prompt"] for entry in rows]
    wanted = one_by_one(folder, asked, prompts, pad=kind == "llava-1.5")
    assert [(entry["text"], entry["finished"]) for entry in rows] == wanted
    assert len({text for text, _ in wanted}) >= 4, "the model's answers differ, or nothing is compared"
    assert summary["n"] == COUNT and summary["images"] == COUNT - 3 == summary["read_images"]
    assert summary["read_tokens"] > summary["prompt_tokens"], "images take tokens"
    assert predicted(folder, asked, tmp_path / "alone", batch=1)[1] == rows
    said = predicted(folder, asked, tmp_path / "first", batch=7, method="first_token")[1]
    letters = [entry["text"] if len(entry["text"]) == 1 and entry["text"] in "ABCDE"[: len(entry["options"])] else None for entry in rows]
    assert all(entry["first_token_letter"] in (letter, None) for entry, letter in zip(said, letters))


def test_a_familys_words_are_vlmevalkits() -> None:
    asked = {"question": "Which colour?", "hint": "Look well.", "options": ["red", "dark blue"], "meta": "{}"}
    words = {name: families.words(families.asked(name), asked) for name in families.names()}
    listed = "A. red\nB. dark blue"
    direct = f"Look well.\nWhich colour?\n{listed}\nAnswer with the option's letter from the given choices directly."
    assert words["llava-1.5"] == words["llava-next"] == words["internvl"] == direct and words["cogvlm"] == direct + "\nShort Answer."
    select = f"Hint: Look well.\nQuestion: Which colour?\nOptions:\n{listed}\nPlease select the correct answer from the options above."
    assert words["qwen2-vl"] == select and words["default"] == words["phi-3-vision"] == select + " \n"
    assert words["idefics2"] == f"Hint: Look well.\nQuestion: Which colour?\nChoices:\n{listed}\nAnswer with the letter."
    assert words["molmo"] == "a_okvqa_mc: Look well.\nWhich colour?\nA: red\nB: dark blue"
    bare = {**asked, "hint": "", "options": []}
    kinds = {"yes_no": {"open": "yes_no"}, "unlisted": {"open": "mmmu"}, "open": {"open": "vqa"}}
    said = {kind: families.words(families.asked("qwen2-vl"), {**bare, "meta": json.dumps(meta)}) for kind, meta in kinds.items()}
    assert said["yes_no"] == "Which colour? Please answer yes or no." and said["unlisted"] == "Question: Which colour?"
    assert said["open"] == "Which colour?\nPlease try to answer the question with short words or phrases if possible."
    mme = {**bare, "question": "Is it red? Please answer yes or no.", "meta": '{"open": "yes_no", "pair": "a/b"}'}
    assert families.words(families.asked("qwen2-vl"), mme) == mme["question"], "MME's words alone"
    twice = {**mme, "meta": '{"open": "yes_no"}'}
    assert families.words(families.asked("qwen2-vl"), twice) == mme["question"], "an instruction isn't said twice"
    odd = {**asked, "question": "What is {options} or {hint}?", "hint": ""}
    assert families.words(families.asked("llava-1.5"), odd).startswith("What is {options} or {hint}?\nA. red")


def test_sets_without_options_are_worded_as_vlmevalkit_words_them_for_the_family() -> None:
    """`build_prompt` of each family's class for POPE, MME, HallusionBench, OCRBench, MM-Vet, MathVista and VQA sets."""
    metas: dict[str, dict[str, Any]] = {
        "POPE": {"open": "yes_no"}, "MME": {"open": "yes_no", "pair": "OCR/1.jpg"}, "HallusionBench": {"open": "yes_no", "set_id": "0"},
        "OCRBench": {"open": "contains"}, "MM-Vet": {"open": "judged"}, "MathVista": {"open": "number"}, "TextVQA": {"open": "vqa"},
    }  # fmt: skip
    word, brief, short = (
        "Answer the question using a single word or phrase.",
        "Give a very brief answer.",
        "Please try to answer the question with short words or phrases if possible.",
    )
    wanted = {
        "llava-1.5": {"TextVQA": f"\n{word}"},
        "llava-next": {"TextVQA": f"\n{word}"},
        "default": {"TextVQA": f"\n{word}"},
        "phi-3-vision": {"TextVQA": f"\n{word}"},
        "cogvlm": {"TextVQA": f"\n{word}", **dict.fromkeys(("POPE", "MME", "HallusionBench"), "\nShort Answer.")},
        "qwen2-vl": {
            **dict.fromkeys(("POPE", "HallusionBench"), " Please answer yes or no."),
            **dict.fromkeys(("OCRBench", "MathVista", "TextVQA"), f"\n{short}"),
        },
        "internvl": {
            "MME": f" {word}", "HallusionBench": f" Please answer yes or no. {word}", "OCRBench": f"\n{word}", "TextVQA": f"\n{word}",
        },
        "idefics2": {
            "MME": f"\n{brief}", "HallusionBench": "\nAnswer yes or no.", "MM-Vet": f"\n{brief}", "TextVQA": f"\n{word}\n{brief}",
        },
    }  # fmt: skip
    bare: dict[str, Any] = {"question": "Is it red?", "hint": "", "options": []}
    assert set(wanted) | {"molmo"} == set(families.names())
    for name, ends in wanted.items():
        for title, meta in metas.items():
            said = families.words(families.asked(name), {**bare, "meta": json.dumps(meta)})
            assert said == "Is it red?" + ends.get(title, ""), (name, title)
    molmo = families.asked("molmo")
    assert {families.words(molmo, {**bare, "meta": json.dumps(meta)}) for meta in metas.values()} == {"vqa2: Is it red?"}


def test_images_go_where_the_family_puts_them() -> None:
    placed, front, first = (families.asked(name) for name in ("idefics2", "llava-next", "phi-3-vision"))
    text = "Compare <image> with <image>."
    assert families.content(placed, text, 3) == [None, "Compare ", None, " with ", None, "."]
    assert families.content(front, text, 3) == [None, None, None, "Compare <image 2> with <image 3>."]
    assert families.content(first, text, 2) == [None, "Compare <image 1> with <image 2>."]
    assert families.content(front, "What is <image>?", 0) == ["What is <image>?"], "without images it is a word"


def test_conversations_are_the_familys_or_the_processors(checkpoint: tuple[str, Path], asked: Path, tmp_path: Path) -> None:
    kind, folder = checkpoint
    prompt = predicted(folder, asked, tmp_path, batch=8)[1][0]["prompt"]
    if kind == "llava-1.5":
        assert prompt.startswith("A chat between a curious human and an artificial intelligence assistant. ")
        assert "USER:  <image> Which colour is this?" in prompt and prompt.endswith("directly. ASSISTANT: ")
    elif kind == "idefics2":
        assert prompt.startswith("User:<image>Question: Which colour") and prompt.endswith("letter.<end_of_utterance>\nAssistant: Answer:")
    elif kind == "llava-next":
        assert "curious user" in prompt and prompt.endswith("directly. ASSISTANT:"), "its own chat template"
    else:
        assert "<|vision_start|><|image_pad|><|vision_end|>Question: Which" in prompt and prompt.endswith("<|im_start|>assistant\n")


def test_the_command_asks_a_hugging_face_directory(asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = released("llava-next", tmp_path / "hub")
    out = ["--questions", str(asked), "--out", str(tmp_path / "out"), "--max-new-tokens", str(LIMIT)]
    assert evaluate.main([str(folder), *out]) == 0
    assert "asked: " in capsys.readouterr().out
    table = parquet.read_table(tmp_path / "out" / "asked" / "out" / "predictions.parquet")
    assert table.num_rows == COUNT
    assert evaluate.main([str(folder), *out, "--prompts", "default"]) == 0
    other = parquet.read_table(tmp_path / "out" / "asked" / "out" / "predictions.parquet")
    assert "Please select the correct answer" in other.column("prompt")[0].as_py() and other.column("prompt") != table.column("prompt")


def test_another_chat_template_or_tokenizer_is_another_model_and_asked_anew(
    asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """What makes a prompt belongs to the key of what was asked, a note beside it doesn't."""
    folder = released("llava-1.5", tmp_path / "hub")
    out = ["--questions", str(asked), "--out", str(tmp_path / "out"), "--max-new-tokens", "1", "--prompts", "default"]

    def taken_up() -> bool:
        assert evaluate.main([str(folder), *out]) == 0
        return "answered before, nothing to ask" in capsys.readouterr().err

    def prompt() -> str:
        return parquet.read_table(tmp_path / "out" / "asked" / "out" / "predictions.parquet").column("prompt")[0].as_py()

    assert not taken_up() and taken_up()
    (folder / "README.rst").write_text("a note")
    assert taken_up()
    template = folder / "chat_template.jinja"
    template.write_text("Please: " + template.read_text())
    assert not taken_up() and prompt().startswith("Please:") and taken_up()


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt", "model.safetensors"]
)
def test_every_file_of_prompts_and_weights_tells_models_apart(name: str, tmp_path: Path) -> None:
    """Of a checkpoint's folder and of a tokenizer's own."""
    for folder in ("weights", "words"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("one")
    spec = {"parts": {"model": {"weights": {"checkpoint": str(tmp_path / "weights")}}}, "tokenizer": str(tmp_path / "words")}
    known = [evaluate.weights_of(spec, {})]
    for folder in ("weights", "words"):
        (tmp_path / folder / name).write_text("another")
        known.append(evaluate.weights_of(spec, {}))
    assert known[0] != known[1] != known[2] != known[0]
    (tmp_path / "words" / "notes.md").write_text("a note")
    assert evaluate.weights_of(spec, {}) == known[2]


def test_mistakes_say_what_to_do(asked: Path, tmp_path: Path) -> None:
    folder = released("llava-1.5", tmp_path / "hub")
    with pytest.raises(UserError, match="did you mean 'llava-1.5'"):
        models.spec_of(str(folder), "llava-15")
    with pytest.raises(UserError, match="remote_code: true"):
        models.spec_of(str(folder), "phi-3-vision")
    assert models.spec_of(str(folder), "phi-3-vision", remote_code=True)["prompts"]["batch"] == 1
    with pytest.raises(UserError, match="build_conversation_input_ids"):
        models.spec_of(str(folder), "cogvlm", remote_code=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(UserError, match="no family of prompts is for 'unheard_of'"):
        models.spec_of(str(tmp_path / "other"))
    with pytest.raises(UserError, match="method: generate or first_token"):
        predicted(folder, asked, tmp_path / "likely", batch=8, method=["generate", "likelihood"])
    with pytest.raises(UserError, match="has no chat template"):
        bare = spec_of(folder)
        (folder / "chat_template.jinja").unlink()
        models.load_processor({**bare["model"], "prompts": families.asked("default")})
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if "linear_2" not in key}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="has no weights for .*linear_2"):
        predicted(folder, asked, tmp_path / "torn", batch=8)


def test_a_checkpoints_own_code_runs_only_where_it_is_asked_for(asked: Path, tmp_path: Path) -> None:
    folder = released("llava-next", tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own_llava"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("language_model.lm_head.weight")  # as a model of its own would name it
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlavaNextConfig, LlavaNextForConditionalGeneration\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(LlavaNextConfig):\n    model_type = 'own_llava'\n"
        "class OwnModel(LlavaNextForConditionalGeneration):\n    config_class = OwnConfig\n"
    )
    model = models.spec_of(str(folder), "llava-next")
    source: Any = None
    with pytest.raises(UserError, match="it brings its own code"):
        models.Existing.build(model, source)
    assert not (tmp_path / "ran").exists()
    allowed = models.Existing.build({**model, "remote_code": True}, source)
    assert (tmp_path / "ran").exists() and type(allowed.parts["model"]).__name__ == "OwnModel"


def test_unreadable_images_and_forged_marks_are_dropped_and_counted(tmp_path: Path) -> None:
    folder = released("llava-1.5", tmp_path / "hub")
    shown = {"question": "Which?", "options": ["red", "blue"], "answer": "A", "label": "red"}
    rows = [row(f"q{i}", images=[{"bytes": kit.square("red", i)}], **shown) for i in range(300)]
    rows[7] = row("bad", images=[{"bytes": b"no image"}], **shown)
    rows[9] = row("forged", **{**shown, "question": "What does <image> say?"})
    write_rows(rows, tmp_path / "rows", classes=["blue", "red"])
    summary, kept = predicted(folder, tmp_path / "rows", tmp_path / "p", batch=64, max_new_tokens=1)
    assert summary["dropped"] == {"image unreadable": 1, existing.MARKED: 1} and len(kept) == 298
