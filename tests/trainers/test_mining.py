"""Mining: cosines are the model's own, images are read once, and no arm's encoder mines its own questions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets_ray.choices import build_from_similarities, read_similarities
from datasets_ray.errors import UserError
from datasets_ray.images import decode, recipe_from_json
from datasets_ray.rows import RowTable, row, write_rows
from datasets_ray.tokens import load_tokenizer
from tests.trainers import evaluation_kit as kit
from trainers import embeddings, mine, similarities, zeroshot
from trainers.context import Context
from trainers.models import build

ROWS = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("mining")
    return {"rows": kit.labelled(folder / "rows", ROWS), "clip": folder / "clip", "spec": kit.clip_part(folder / "clip")}


def mined(world: dict[str, Any], out: Path, *more: str) -> dict[str, Any]:
    """One run of the command in this process; returns the artefact's manifest."""
    inputs = [] if "--images" in more else ["--rows", str(world["rows"])]
    assert mine.main(["--model", str(world["clip"]), *inputs, "--out", str(out), "--actors", "0", *more]) == 0
    return json.loads((out / "manifest.json").read_text())


@torch.no_grad()
def reference(world: dict[str, Any], template: str) -> np.ndarray:
    """Cosines by open_clip's own CLIP, one image and one text at a time."""
    ctx = Context.local(world["clip"] / "reference", {"id": "r", "spec": {}}, {"clip": world["clip"]})
    clip = build(world["spec"], ctx, image=kit.IMAGE).clip
    rows, recipe, tokenizer = RowTable(world["rows"]), recipe_from_json(kit.IMAGE), load_tokenizer(kit.TOKENIZER)
    mean, std = (torch.tensor(kit.IMAGE[k])[:, None, None] for k in ("mean", "std"))
    images = [torch.from_numpy(recipe.fit(decode(r["images"][0])).copy()).permute(2, 0, 1) / 255 for r in rows]
    left = torch.cat([clip.encode_image(((image - mean) / std)[None], normalize=True) for image in images])
    right = []
    for name in rows.manifest["classes"]:
        ids = [*tokenizer(template.format(name))["input_ids"], tokenizer.eos_token_id]
        hidden = clip.token_embedding(torch.tensor([ids])) + clip.positional_embedding[: len(ids)]
        hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask[: len(ids), : len(ids)]))
        right.append(torch.nn.functional.normalize(hidden[:, -1] @ clip.text_projection, dim=-1))
    return (left @ torch.cat(right).T).numpy()


def stages(world: dict[str, Any], folder: Path, template: Any = "a photo of a {}", image: dict[str, Any] = kit.IMAGE) -> Path:
    """The embeddings and similarities stages, as the grid runs them."""
    inputs = {"rows": world["rows"], "clip": world["clip"]}
    spec = {"model": world["spec"], "rows": "rows", "image": image, "precision": "fp32"}
    first = Context.local(folder / "e", {"id": "e", "spec": spec, "runtime": {"eval_batch": 16}}, inputs)
    embeddings.run(spec, first)
    spec = {"embeddings": "e", "model": world["spec"], "rows": "rows", "template": template}
    second = Context.local(folder / "s", {"id": "s", "spec": spec}, {**inputs, "e": first.out}, cache=first.cache)
    similarities.run(spec, second)
    return second.out


def test_cosines_are_the_models_own(world: dict[str, Any], tmp_path: Path) -> None:
    matrix, made = read_similarities(stages(world, tmp_path))
    np.testing.assert_allclose(matrix, reference(world, "a photo of a {}"), atol=1e-5)
    assert made["ids"] == [f"r{i}" for i in range(ROWS)] and made["classes"] == sorted(kit.COLOURS)
    assert made["template"] == "a photo of a {}" and made["truncated"] == 0
    vectors = np.load(tmp_path / "e" / "out" / "embeddings.npy")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_templates_are_averaged_and_long_ones_counted(world: dict[str, Any], tmp_path: Path) -> None:
    both = ["a photo of a {}", "art of the {c}."]
    matrix, _ = read_similarities(stages(world, tmp_path / "both", both))
    model = build(world["spec"], Context.local(tmp_path, {"id": "r", "spec": {}}, {"clip": world["clip"]}), image=kit.IMAGE)
    texts = [similarities.class_embeddings(model, sorted(kit.COLOURS), one, "cpu")[0] for one in both]
    mean = (texts[0] + texts[1]) / np.linalg.norm(texts[0] + texts[1], axis=1, keepdims=True)
    np.testing.assert_allclose(matrix, np.load(tmp_path / "both" / "e" / "out" / "embeddings.npy") @ mean.T, atol=1e-5)
    _, long = read_similarities(stages(world, tmp_path / "long", "very " * 40 + "{}"))
    assert long["truncated"] == 5
    with pytest.raises(UserError, match="no place for the class name"):
        similarities.filled("a photo", ["x"])


def test_the_command_equals_the_stages(world: dict[str, Any], tmp_path: Path) -> None:
    manifest = mined(world, tmp_path / "m", "--recipe", json.dumps(kit.IMAGE))
    from_stages, made = read_similarities(stages(world, tmp_path / "s"))
    np.testing.assert_array_equal(read_similarities(tmp_path / "m")[0], from_stages)
    assert {k: manifest[k] for k in ("ids", "classes", "template")} == {k: made[k] for k in ("ids", "classes", "template")}


def test_another_template_labels_or_k_touch_no_image(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--cache", str(tmp_path / "cache")]
    first = mined(world, tmp_path / "a", *cache)
    assert json.loads(capsys.readouterr().out)["embeddings"] == "made"
    monkeypatch.setattr(mine.ImageTask, "__call__", lambda *_: pytest.fail("an image was read again"))
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\nwhite\nblack\nyellow\n")
    again = mined(world, tmp_path / "b", *cache, "--template", "an image of a {}", "--labels", str(tmp_path / "names.txt"))
    assert json.loads(capsys.readouterr().out)["embeddings"] == "reused"
    assert again["ids"] == first["ids"] and again["classes"][-1] == "yellow"
    for k in (2, 4, 5):
        assert build_from_similarities(tmp_path / "b", world["rows"], tmp_path / f"k{k}", k=k, seed=0)["rows"] == ROWS
    # other weights, and other rows, are other embeddings
    monkeypatch.undo()
    other = {**world, "clip": tmp_path / "clip"}
    kit.clip_part(tmp_path / "clip", seed=5)
    mined(other, tmp_path / "c", *cache)
    assert json.loads(capsys.readouterr().out)["embeddings"] == "made"


def test_the_same_weights_in_another_place_are_the_same_model(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--cache", str(tmp_path / "cache")]
    mined(world, tmp_path / "a", *cache)
    capsys.readouterr()
    shutil.copytree(world["clip"], tmp_path / "moved")
    mined({**world, "clip": tmp_path / "moved"}, tmp_path / "b", *cache)
    assert json.loads(capsys.readouterr().out)["embeddings"] == "reused"
    with pytest.raises(UserError, match="the miner is the encoder of an arm"):
        mined(world, tmp_path / "c", "--arm-encoder", str(tmp_path / "moved"))
    kit.clip_part(tmp_path / "other", seed=5)
    mined(world, tmp_path / "d", "--arm-encoder", str(tmp_path / "other"), "--arm-encoder", "ViT-L-14-336:openai/clip")


def test_a_folder_of_folders_is_labelled_rows(world: dict[str, Any], tmp_path: Path) -> None:
    for number, name in enumerate(["red", "dark_blue"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "images" / name / f"{i}.png").write_bytes(kit.square("red", 10 * number + i))
    manifest = mined(world, tmp_path / "m", "--images", str(tmp_path / "images"))
    assert manifest["classes"] == ["dark blue", "red"] and len(manifest["ids"]) == 6
    made = build_from_similarities(tmp_path / "m", tmp_path / "m" / "rows", tmp_path / "q", k=2, seed=0)
    assert made["rows"] == 6 and made["root"] == str((tmp_path / "images").resolve())
    key = next((tmp_path / "m" / "embeddings").iterdir())
    (tmp_path / "images" / "red" / "0.png").write_bytes(kit.square("green", 99) + b"more")
    mined(world, tmp_path / "m", "--images", str(tmp_path / "images"))
    assert len(list((tmp_path / "m" / "embeddings").iterdir())) == 2 and key.exists()


def test_unreadable_images_are_dropped_up_to_a_share(world: dict[str, Any], tmp_path: Path) -> None:
    good = [row(f"g{i}", images=[{"bytes": kit.square("red", i)}], label="red") for i in range(120)]
    bad = row("bad", images=[{"bytes": b"no image"}], label="blue")
    write_rows([good[0], bad, *good[1:]], tmp_path / "rows", classes=["blue", "red"])
    inputs = {**world, "rows": tmp_path / "rows"}
    manifest = mined(inputs, tmp_path / "m")
    assert len(manifest["ids"]) == 120 and "bad" not in manifest["ids"]
    made = build_from_similarities(tmp_path / "m", tmp_path / "rows", tmp_path / "q", k=2, seed=0)
    assert made["dropped"] == {"no similarities": 1} and made["rows"] == 120
    spec = {"similarities": "m", "rows": "rows", "choices": "q", "metric": "accuracy"}
    ctx = Context.local(tmp_path / "z", {"id": "z", "spec": spec}, {"m": tmp_path / "m", "rows": tmp_path / "rows", "q": tmp_path / "q"})
    scores = zeroshot.run(spec, ctx)
    assert scores["n"] == 120 and scores["top1"] == scores["among_choices"]  # two classes: the choices are all there is
    write_rows([good[0], bad], tmp_path / "worse", classes=["blue", "red"])
    with pytest.raises(UserError, match="1 of 2 rows were dropped"):
        mined({**world, "rows": tmp_path / "worse"}, tmp_path / "w")


def test_mistakes_are_one_message(world: dict[str, Any], tmp_path: Path) -> None:
    rows = ["--rows", str(world["rows"]), "--out", str(tmp_path / "o")]
    with pytest.raises(UserError, match="open_clip has no model 'ViT-Q'"):
        mine.main(["--model", "ViT-Q", *rows])
    with pytest.raises(UserError, match="no weights for ViT-B-32"):
        mine.main(["--model", "ViT-B-32", *rows])
    with pytest.raises(UserError, match="neither model.json, open_clip_config.json nor config.json"):
        mine.main(["--model", str(tmp_path), *rows])
    (tmp_path / "vlm").mkdir()
    (tmp_path / "vlm" / "model.json").write_text(json.dumps(kit.vlm_spec()))
    with pytest.raises(UserError, match="family 'vlm'"):
        mine.main(["--model", str(tmp_path / "vlm"), *rows])


@pytest.mark.slow
def test_ray_actors_embed_as_this_process_does(world: dict[str, Any], tmp_path: Path, repository: Path) -> None:
    mined(world, tmp_path / "here")
    named = ["--model", str(world["clip"]), "--rows", str(world["rows"]), "--out", str(tmp_path / "ray"), "--batch", "9"]
    done = subprocess.run([sys.executable, "-m", "trainers.mine", *named], cwd=repository, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(read_similarities(tmp_path / "ray")[0], read_similarities(tmp_path / "here")[0], atol=1e-6)
    assert json.loads(done.stdout.splitlines()[-1])["embeddings"] == "made"
