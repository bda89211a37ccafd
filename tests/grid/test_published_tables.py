"""Published tables that people bring: what a spreadsheet makes of them is read or told with its line, never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from datasets_ray.errors import UserError
from grid import general_axis
from grid.report.published import find_table, load_published

HEAD = "row,source,encoder,fine_grained\n"

WRONG: dict[str, tuple[bytes | str, str]] = {
    "another table": ("a,b\n1,2\n", "t.csv:1: "),
    "words for a score": (f"{HEAD}1,trained,x,abc\n", "t.csv:2: fine_grained is 'abc'"),
    "no number": (f"{HEAD}1,trained,x,nan\n", "t.csv:2: fine_grained is 'nan'"),
    "no rows": (HEAD, "has no rows"),
    "nothing": ("", "has no rows"),
    "another encoding": (b"\xff\xfe", "is not UTF-8"),
    "semicolons": ("row;source;encoder;fine_grained\n1;trained;x;50,5\n", "t.csv:1: columns are separated by ';'"),
    "a percent sign": (f"{HEAD}1,trained,x,50.5%\n", "hint: write 50.5"),
    "a decimal comma": (f'{HEAD}1,trained,x,"50,5"\n', "hint: write 50.5"),
    "thousands with a mark": (f"{HEAD}1,trained,x,5_0\n", "t.csv:2: fine_grained is '5_0'"),
    "shares": (f"{HEAD}1,trained,x,0.505\n2,trained,y,0.6\n", "seems to hold shares"),
    "too much": (f"{HEAD}1,trained,x,150\n", "percentage points, 0 to 100"),
    "a row twice": (f"{HEAD}1,trained,x,5\n1,trained,y,6\n", "t.csv:3: row 1 twice (also in line 2)"),
    "half a row": (f"{HEAD}1.5,trained,x,5\n", "t.csv:2: row is '1.5'"),
    "a row below zero": (f"{HEAD}-1,trained,x,5\n", "t.csv:2: row is '-1'"),
    "a column twice": ("row,source,encoder,encoder,fine_grained\n1,trained,x,y,5\n", "t.csv:1: column 'encoder' is there twice"),
    "too few cells": (f"{HEAD}1,trained\n", "t.csv:2: 2 cells (the header has 4)"),
    "a comma in a cell": (f"{HEAD}1,trained,x, y,5\n", "t.csv:2: 5 cells (the header has 4)"),
    "an open quote": (f'{HEAD}1,trained,"x,5\n', "not CSV"),
    "another source": (f"{HEAD}1,train,x,5\n", "did you mean 'trained'?"),
}


def test_what_a_spreadsheet_saves_is_read(tmp_path: Path) -> None:
    """A byte order mark, ends of line of Windows, blanks and empty lines; no other paper's effects, steps and notes beside it."""
    text = "row, source, encoder, fine_grained\n\n1, , x, 50.5\n,released,y,\n"
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    found = load_published(tmp_path / "t.csv")
    assert [(arm.row, arm.source, arm.axes, arm.averages) for arm in found.arms] == [
        (1, "trained", {"encoder": "x"}, {"fine_grained": 50.5}), (None, "released", {"encoder": "y"}, {}),
    ]  # fmt: skip
    assert (found.contrasts, found.steps, found.notices) == ([], [], [])
    packaged = load_published(find_table("fine_grained"))
    (tmp_path / "fine_grained_ablation.csv").write_bytes(find_table("fine_grained").read_bytes())
    assert load_published(tmp_path / "fine_grained_ablation.csv").contrasts == packaged.contrasts != []


@pytest.mark.parametrize("kind", WRONG)
def test_each_table_that_can_not_be_is_told(kind: str, tmp_path: Path) -> None:
    text, says = WRONG[kind]
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as told:
        load_published(tmp_path / "t.csv")
    assert says in str(told.value)


def test_effects_beside_a_table_have_their_columns(tmp_path: Path) -> None:
    (tmp_path / "own_ablation.csv").write_text(f"{HEAD}1,trained,x,50\n")
    (tmp_path / "own_effects.csv").write_text("name,axis\na,encoder\n")
    with pytest.raises(UserError, match="own_effects.csv:1: no column 'effect'"):
        load_published(tmp_path / "own_ablation.csv")


def test_a_general_axis_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "axis.csv").write_bytes(b"\xef\xbb\xbfmodel,average\r\none,51.4\r\n")
    assert general_axis.read(tmp_path / "axis.csv") == {"one": 51.4}
