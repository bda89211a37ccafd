"""Zero-shot classification beyond open_clip's single template: SigLIP from transformers, ensembles of texts, CLIP's own prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets_ray.choices import build_from_similarities, read_similarities
from datasets_ray.clip_templates import FILE, ensemble
from datasets_ray.errors import UserError
from datasets_ray.images import pixels, recipe_from_json
from datasets_ray.rows import RowTable
from tests.trainers import evaluation_kit as kit
from trainers import embeddings, similarities, zeroshot
from trainers.context import Context
from trainers.interchange.processors import tokenizer_with
from trainers.models import build

SQUASHED = {"kind": "square", "size": 16, "patch": 8, "fit": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import SiglipConfig, SiglipModel

    folder, tokenizer = tmp_path_factory.mktemp("siglip") / "hub", tokenizer_with(kit.TOKENIZER, [])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 12, "projection_size": 32}
    torch.manual_seed(0)
    SiglipModel(SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})).save_pretrained(folder)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    return folder


def spec_of(folder: Path, **config: Any) -> dict[str, Any]:
    part = {"builder": "transformers_vision", "config": config, "weights": {"checkpoint": str(folder), "revision": None}}
    return {"family": "clip", "parts": {"encoder": part}}


def test_siglip_embeds_as_transformers_does(siglip: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, SiglipModel

    model = build(spec_of(siglip), Context.local(tmp_path, {"id": "z", "spec": {}}), image=SQUASHED)
    theirs, tokenizer = SiglipModel.from_pretrained(siglip).eval(), AutoTokenizer.from_pretrained(siglip)
    image = torch.from_numpy(pixels({"bytes": kit.square("red", 1), "path": None}, recipe_from_json(SQUASHED)))[None]
    wanted = theirs.get_image_features(pixel_values=(image.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).pooler_output
    torch.testing.assert_close(model.embed_images(image), torch.nn.functional.normalize(wanted, dim=-1), atol=1e-5, rtol=0)
    texts = ["a photo of a red", "a photo of a blue"]
    ids = tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
    wanted = torch.nn.functional.normalize(theirs.get_text_features(input_ids=ids).pooler_output, dim=-1)
    ready, cut = model.tokenize(texts, "cpu")
    torch.testing.assert_close(model.embed_texts(ready), wanted, atol=1e-5, rtol=0)
    assert cut == 0 and model.tokenize(["a very " * 20], "cpu")[1] == 1
    with pytest.raises(UserError, match="images of size 32 for a SigLIP of size 16"):
        build(spec_of(siglip), Context.local(tmp_path, {"id": "z", "spec": {}}), image={**SQUASHED, "size": 32})
    with pytest.raises(UserError, match="neither mines nor classifies"):
        build(spec_of(siglip, model_type="siglip_vision_model"), Context.local(tmp_path, {"id": "z", "spec": {}}), image=SQUASHED)


def test_texts_reach_a_siglip_in_small_letters_whatever_its_tokenizer_does(siglip: Path, tmp_path: Path) -> None:
    """SigLIP 2's checkpoints name a Gemma tokenizer, which keeps capitals; it was trained without any."""
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(siglip)
    assert plain("A Photo of a RED")["input_ids"] != plain("a photo of a red")["input_ids"], "a tokenizer that keeps capitals"
    model = build(spec_of(siglip), Context.local(tmp_path, {"id": "z", "spec": {}}), image=SQUASHED)
    (ids, cut), (small, _) = model.tokenize(["A Photo of a RED"], "cpu"), model.tokenize(["a photo of a red"], "cpu")
    assert torch.equal(ids, small) and cut == 0


def test_a_layer_that_an_arm_chooses_leaves_a_siglip_whole(siglip: Path, tmp_path: Path) -> None:
    images = torch.from_numpy(pixels({"bytes": kit.square("red", 1), "path": None}, recipe_from_json(SQUASHED)))[None]
    made = [
        build(spec_of(siglip, **config), Context.local(tmp_path, {"id": "z", "spec": {}}), image=SQUASHED).embed_images(images)
        for config in ({}, {"layer": -1})
    ]
    assert torch.equal(*made)


def stages(model: dict[str, Any], template: Any, rows: Path, out: Path, data_root: str | None = None) -> dict[str, Any]:
    """embeddings, similarities, choices, zeroshot; the last one's scores."""
    spec = {"model": model, "rows": "rows", "image": SQUASHED, "precision": "fp32"}
    first = Context.local(out / "e", {"id": "e", "spec": spec}, {"rows": rows})
    embeddings.run(spec, first)
    spec = {"embeddings": "e", "model": model, "rows": "rows", "template": template}
    second = Context.local(out / "s", {"id": "s", "spec": spec}, {"rows": rows, "e": first.out}, data_root=data_root)
    similarities.run(spec, second)
    build_from_similarities(second.out, rows, out / "q", k=3, seed=0)
    spec = {"similarities": "s", "rows": "rows", "choices": "q", "metric": "accuracy"}
    third = Context.local(out / "z", {"id": "z", "spec": spec}, {"s": second.out, "rows": rows, "q": out / "q"})
    return zeroshot.run(spec, third)


def test_an_ensemble_is_the_mean_of_unit_vectors(siglip: Path, tmp_path: Path) -> None:
    rows, texts = kit.labelled(tmp_path / "rows", 15), ["a photo of a {}", "a drawing of the {c}."]
    scores = stages(spec_of(siglip), texts, rows, tmp_path / "both")
    assert scores["template"] == texts and scores["n"] == 15 and scores["among_choices_n"] == 15 and scores["top5"] == 1.0
    matrix, made = read_similarities(tmp_path / "both" / "s" / "out")
    model = build(spec_of(siglip), Context.local(tmp_path, {"id": "z", "spec": {}}), image=SQUASHED)
    with torch.no_grad():
        named = [[text.replace("{}", name).replace("{c}", name) for name in made["classes"]] for text in texts]
        one, other = (model.embed_texts(model.tokenize(texts_of, "cpu")[0]) for texts_of in named)
        mean = torch.nn.functional.normalize(one + other, dim=-1).numpy()
    vectors = np.load(tmp_path / "both" / "e" / "out" / "embeddings.npy")
    np.testing.assert_allclose(matrix, vectors @ mean.T, atol=1e-5)
    labels = np.array(RowTable(rows).column("label"))
    assert scores["top1"] == pytest.approx(np.mean(np.array(made["classes"])[matrix.argmax(1)] == labels))


def test_clips_own_prompts_are_read_below_the_data_root(siglip: Path, tmp_path: Path) -> None:
    file = tmp_path / "data" / FILE
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"pets": ["a photo of a {c}, a type of pet."], "colours": ["the colour {c}.", "{c} paint."]}))
    rows = kit.labelled(tmp_path / "rows", 10)
    scores = stages(spec_of(siglip), {"ensemble": "colours"}, rows, tmp_path / "run", str(tmp_path / "data"))
    assert scores["template"] == ["the colour {c}.", "{c} paint."]
    with pytest.raises(UserError, match="did you mean 'colours'"):
        ensemble("colors", str(tmp_path / "data"))
    with pytest.raises(UserError, match="no data root.*FINEGRID_DATA=DIR|FINEGRID_DATA"):
        ensemble("colours", None)
    with pytest.raises(UserError, match="can't be read"):
        ensemble("colours", str(tmp_path / "elsewhere"))


def test_the_real_file_has_clips_prompts(data_root: Path) -> None:
    if not (data_root / FILE).is_file():
        pytest.skip(f"{FILE} isn't among the data")
    root = str(data_root)
    assert ensemble("pets", root) == ["a photo of a {c}, a type of pet."] and len(ensemble("imagenet1k", root)) == 80
    assert ensemble("food101", root) == ["a photo of {c}, a type of food."]
    assert ensemble("flowers", root) == ["a photo of a {c}, a type of flower."]
