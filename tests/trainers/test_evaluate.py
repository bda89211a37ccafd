"""`python -m trainers.evaluate`: the stages' own numbers for a finished model, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pyarrow import parquet

from datasets_ray.errors import UserError
from tests.trainers import evaluation_kit as kit
from trainers import evaluate, predict, score
from trainers.context import Context


def test_the_command_is_predict_and_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    model = kit.talkative(store / "talkative")
    asked = kit.questions(tmp_path / "colours", 30)
    spec = {
        "model": model, "questions": "asked", "image": kit.IMAGE, "suffix": kit.SUFFIX, "method": "generate", "max_new_tokens": 4,
        "precision": "fp32",
    }  # fmt: skip
    ctx = Context.local(tmp_path / "stage", {"id": "p", "spec": spec}, {"asked": asked, "talkative": store / "talkative"})
    predict.run(spec, ctx)
    wanted = score.score(parquet.read_table(ctx.out / "predictions.parquet"), "vlmevalkit", "mean_per_class")[1] | {"method": "generate"}

    # the same model, its llm in an artefact of its own that passes the other parts on
    tuned = store / "tuned"
    tuned.mkdir()
    (store / "talkative" / "llm.safetensors").rename(tuned / "llm.safetensors")
    model["parts"]["llm"]["weights"] = {"stage": "tuned"}
    (tuned / "model.json").write_text(json.dumps(model))
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(kit.IMAGE))
    arguments = [str(tuned), "--questions", str(asked), "--out", str(tmp_path / "out"), "--recipe", str(recipe), "--max-new-tokens", "4"]
    assert evaluate.main([*arguments, "--metric", "mean_per_class"]) == 0
    assert "colours: " in capsys.readouterr().out
    scores = json.loads((tmp_path / "out" / "colours" / "out" / "scores.json").read_text())
    assert {k: v for k, v in scores.items() if k != "dropped"} == wanted
    assert parquet.read_table(tmp_path / "out" / "colours" / "out" / "scored.parquet").num_rows == 30
    assert evaluate.main([*arguments, "--method", "likelihood", "--method", "generate", "--metric", "mean_per_class"]) == 0
    shown = capsys.readouterr()
    assert "(mean_per_class, likelihood, text_raw, n 30" in shown.out and "  likelihood_letter_per_token: " in shown.out
    assert f"  generate: {wanted['value']:.1f} " in shown.out
    assert "colours: 30 answers, " in shown.err and " settled by their first token; threshold " in shown.err

    with pytest.raises(UserError, match="same directory name"):
        evaluate.main([*arguments, "--questions", str(asked)])
    (store / "talkative").rename(store / "elsewhere")
    with pytest.raises(UserError, match="isn't beside"):
        evaluate.main(arguments)
    with pytest.raises(UserError, match="model.json is missing"):
        evaluate.main([str(tmp_path), *arguments[1:]])
    kit.clip_part(tmp_path / "clip")
    with pytest.raises(UserError, match="answers no questions"):
        evaluate.main([str(tmp_path / "clip"), *arguments[1:]])


@pytest.mark.parametrize("name", ["model.json", "config.json", "open_clip_config.json"])
@pytest.mark.parametrize(("text", "says"), [("{", "can't be read"), ("[1]", "holds no object"), ("\xff", "can't be read")])
def test_a_model_whose_files_are_torn_is_told(name: str, text: str, says: str, tmp_path: Path) -> None:
    """By the command that asks it, the one that exports it and the one that mines with it."""
    from trainers import export, mine

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(text.encode("latin-1"))
    model, root = str(folder), str(tmp_path)
    mined = ["--model", model, "--images", root, "--labels", str(tmp_path / "names.txt"), "--out", str(tmp_path / "mined")]
    asked = [model, "--benchmarks", "pope", "--data-root", root, "--out", str(tmp_path / "asked")]
    commands = [(mine.main, mined)]
    commands += [(evaluate.main, asked)] if name != "open_clip_config.json" else []
    commands += [(export.main, [model, str(tmp_path / "exported")])] if name == "model.json" else []
    for command, words in commands:
        with pytest.raises(UserError, match=f"{name} {says}"):
            command(words)


def test_what_a_flag_holds_is_told_where_it_is_no_json(tmp_path: Path) -> None:
    from trainers.evaluate import recipe_of

    (tmp_path / "r.json").write_text("{")
    spec = {"parts": {"encoder": {"config": {}}}}
    told = {"{": "--recipe is no JSON", str(tmp_path / "r.json"): "r.json can't be read", "nowhere.json": "can't be read"}
    for given, says in told.items():
        with pytest.raises(UserError, match=says):
            recipe_of(spec, given)
    assert recipe_of(spec, '{"kind": "square"}') == {"kind": "square"}


def test_a_torn_manifest_of_rows_is_told(tmp_path: Path) -> None:
    from datasets_ray.rows import open_rows

    (tmp_path / "manifest.json").write_text('{"rows"')
    with pytest.raises(UserError, match="manifest.json can't be read"):
        open_rows(str(tmp_path))
