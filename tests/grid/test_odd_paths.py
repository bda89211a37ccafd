"""Paths that a study, a profile or a run can't have: one clear error each, exit 1, no traceback; links lead where they point."""

from __future__ import annotations

import json

import pytest

from grid import plan
from grid import run as run_command
from tests.grid.studies import STUDY, changed, write


def test_a_path_that_is_none_is_no_file(tmp_path, refused):
    """Links in a circle, names that no file system takes."""
    write(tmp_path)
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for name in ("loop.yaml", "x" * 5000, "a\0.yaml", "."):
        assert "no file " in refused(plan.main, [name, "--profile", "profile.yaml"])
    assert "no profile " in refused(plan.main, ["study.yaml", "--profile", "x" * 5000])


def test_what_lies_beside_a_linked_study_is_found(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    study, profile = write(tmp_path / "own", study=changed(STUDY, "seed: 3", "seed: 3\npublished: t.csv\ngeneral_axis: {file: g.csv}"))
    (tmp_path / "own" / "t.csv").write_text("row,source,encoder,fine_grained\n2,trained,strong,50\n")
    (tmp_path / "own" / "g.csv").write_text("model,average\nfirst,5\n")
    (tmp_path / "linked.yaml").symlink_to(study)
    monkeypatch.chdir(tmp_path)
    assert plan.make_plan("linked.yaml", profile=profile)["stages"] == plan.make_plan(study, profile=profile)["stages"]


def test_folders_that_a_run_cannot_have(tmp_path, refused):
    write(tmp_path)
    words = ["study.yaml", "--profile", "profile.yaml", "--out"]
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text('{"a": 1}')
    for out, says in {
        "file": "is a file", "file/x": "can't be written", "other": "it holds other files", "damaged": "can't be read",
        "foreign": "was not written by grid.run",
    }.items():  # fmt: skip
        assert says in refused(run_command.main, [*words, out])
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"
    (tmp_path / "locked" / "run.lock").mkdir(parents=True)
    for number, said in enumerate([{"epoch": "x"}, {"epoch": None}, {"drivers": 3}]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "run.json").write_text(json.dumps({"id": "a", "epoch": 1, "study": "small", "drivers": [], **said}))
        assert "its epoch or drivers can't be read" in refused(run_command.main, [*words, str(number)])
    for out, says in {
        "": "--out is empty", "a\0b": "null byte", "x" * 300: "File name too long", "locked": "run.lock can't be opened",
    }.items():  # fmt: skip
        assert says in refused(run_command.main, [*words, out])
    assert "file is a file" in refused(run_command.main, [*words, "new", "--set", "store=file"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"study": 1}', "\xff"])
def test_a_folder_that_is_no_run_is_told(text, tmp_path, refused):
    from grid import status
    from grid.report.load import load_run

    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    (tmp_path / "run.json").write_text(json.dumps({"state": "finished", "epoch": 1}))
    assert "plan.json" in refused(status.main, ["."])
    assert "plan.json" in refused(lambda words: load_run(words[0]), ["."])
    assert "no such folder" in refused(lambda words: load_run(words[0]), ["nowhere"])
