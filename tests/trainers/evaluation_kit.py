"""What the evaluation tests share: coloured squares as labelled images and questions, a tiny VLM that answers at random, a tiny CLIP."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets_ray.answers import LETTERS
from datasets_ray.rows import row, write_rows
from datasets_ray.tokens import end_id, load_tokenizer
from tests.trainers.tiny_models import NATIVE, QWEN2_VL
from trainers.context import Context
from trainers.models import build, save_part

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "white": (240, 240, 240), "black": (10, 10, 10)}
IMAGE = {"kind": "square", "size": 16, "patch": 8, "fit": "squash", "mean": [0.5] * 3, "std": [0.25] * 3}
NATIVE_IMAGE = {**NATIVE, "mean": [0.5] * 3, "std": [0.25] * 3}
TOKENIZER = "tiny-llama"
VOCABULARY = 1536
SUFFIX = "Answer with the option's letter from the given choices directly."
CLIP = {
    "embed_dim": 16, "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 1}, "tokenizer": TOKENIZER,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip


def square(colour: str, number: int) -> bytes:
    """PNG of an image in about that colour, 16 pixels high and 20 to 44 wide."""
    noise = np.random.default_rng(number).integers(-20, 20, (16, 20 + number % 4 * 8, 3))
    made = io.BytesIO()
    Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)).save(made, "PNG")
    return made.getvalue()


def labelled(folder: Path, count: int) -> Path:
    names = sorted(COLOURS)
    rows = [row(f"r{i}", images=[{"bytes": square(names[i % 5], i)}], label=names[i % 5]) for i in range(count)]
    write_rows(rows, folder, classes=names)
    return folder


def questions(folder: Path, count: int, text_only: int = 0, broken: int = 0) -> Path:
    """Questions of two to five options and various lengths; the last `text_only` show no image, the first `broken` an unreadable one."""
    rng = np.random.default_rng(0)
    names, rows = sorted(COLOURS), []
    for i in range(count):
        label = names[i % 5]
        options = [label, *rng.permutation([n for n in names if n != label])[: i % 4 + 1]]
        shown = [str(options[j]) for j in rng.permutation(len(options))]
        images = [] if i >= count - text_only else [{"bytes": b"no image" if i < broken else square(label, i)}]
        words = " ".join(["please"] * int(rng.integers(0, 9)))
        answer = LETTERS[shown.index(label)]
        rows.append(row(f"q{i}", images=images, question=f"Which colour is this? {words}", options=shown, answer=answer, label=label))
    write_rows(rows, folder, classes=names)
    return folder


def fresh(config: dict[str, Any], builder: str, seed: int) -> dict[str, Any]:
    return {"builder": builder, "config": config, "weights": {"fresh": seed}}


def vlm_spec() -> dict[str, Any]:
    parts = {"encoder": fresh(CLIP, "open_clip", 1), "connector": fresh({"depth": 2}, "mlp", 2), "llm": fresh(LLAMA, "causal_lm", 3)}
    return {"family": "vlm", "template": "vicuna_v1", "tokenizer": TOKENIZER, "parts": parts}


def clip_spec(seed: int = 4) -> dict[str, Any]:
    return {"family": "clip", "parts": {"encoder": fresh(CLIP, "open_clip", seed)}}


def qwen2_vl_spec() -> dict[str, Any]:
    config = {**QWEN2_VL, "text_config": {**QWEN2_VL["text_config"], "vocab_size": VOCABULARY}}
    parts = {name: fresh(config, "qwen2_vl", seed) for seed, name in enumerate(("encoder", "connector", "llm"))}
    return {"family": "qwen2_vl", "template": "qwen2_vl", "tokenizer": "tiny-qwen2", "parts": parts}


def talkative(folder: Path, spec: dict[str, Any] | None = None, image: dict[str, Any] = IMAGE) -> dict[str, Any]:
    """ModelSpec of a VLM with large random weights that says letters, a few words and its end token, whichever the prompt and the image
    stir up: answers of all lengths, without training. Its weights lie in `folder`, the artefact of stage "talkative"."""
    spec = spec or vlm_spec()
    model = build(spec, Context.local(folder / "building", {"id": "t", "spec": {}}), image=image)
    tokenizer = load_tokenizer(spec["tokenizer"])
    words = tokenizer(" ".join([*"ABCDE", "the answer is a red one"]), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for name in ("llm", "connector"):
            for parameter in model.parts[name].parameters():
                if parameter.dim() > 1:
                    parameter.mul_(12)
        head = torch.zeros(VOCABULARY, 1)
        head[[*words, end_id(spec["template"], tokenizer)]] = 1
        model.lm_head.weight.mul_(head)
    for name in spec["parts"]:
        save_part(model, name, folder / f"{name}.safetensors")
        spec["parts"][name]["weights"] = {"stage": "talkative"}
    (folder / "model.json").write_text(json.dumps(spec))
    return spec


def clip_part(folder: Path, seed: int = 4) -> dict[str, Any]:
    """Writes the artefact of a stage that trained a CLIP (model.json, encoder.safetensors); returns its ModelSpec."""
    spec = clip_spec(seed)
    model = build(spec, Context.local(folder / "building", {"id": "c", "spec": {}}), image=IMAGE)
    save_part(model, "encoder", folder / "encoder.safetensors")
    spec["parts"]["encoder"]["weights"] = {"stage": "clip"}
    (folder / "model.json").write_text(json.dumps(spec))
    return spec
