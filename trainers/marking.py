"""Reading answers: rows of predictions and a rule in, what each answer says and how right it is out. No numbers over sets here.

A question with options is read by the answer rule (`datasets_ray.answers`), one without by the open rule that its `meta` names
(`datasets_ray.open_answers`). A judge (`trainers.judging`) takes the place of the rule where a score has one: it grades, or says correct or
incorrect, or takes out of a longer text what the rule then reads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from datasets_ray import metrics
from datasets_ray.answers import LETTERS, Rule, lettered
from datasets_ray.benchmark_metrics import Marks
from datasets_ray.errors import UserError
from datasets_ray.open_answers import CONTAINS, FORMULA, JUDGED, YES_NO, credit, yes_or_no
from datasets_ray.rows import open_rows
from trainers import judging
from trainers.judge import Judge

FORMULAS = "Handwritten Mathematical Expression Recognition"
"""OCRBench's category whose blanks mean nothing."""
Row = dict[str, Any]


@dataclass
class Judging:
    """A judge, its prompt and where the questions' words are; `rows` of a score's predictions are asked about."""

    judge: Judge
    prompt: str
    questions: Mapping[str, str]
    """id → question; a row that isn't there is told by its whole prompt."""

    def question(self, row: Row) -> str:
        return self.questions.get(row["id"]) or (row.get("prompt") or "").replace("<image>", "")

    @classmethod
    def of(cls, judge: Judge, prompt: str, questions: Path | None) -> Judging:
        if questions is None:
            return cls(judge, prompt, {})
        table = open_rows(str(questions))
        return cls(judge, prompt, dict(zip(table.column("id"), table.column("question"))))


@dataclass
class Marked:
    """Questions with what was read of their answers; all have length N."""

    rows: list[Row]
    """id, label, options, answer, text; meta as a dict."""
    letters: list[str | None]
    valid: np.ndarray
    """bool[N]"""
    credit: np.ndarray
    """float[N]: how right, 0 to 1."""
    guess: np.ndarray
    """float[N]: how likely a guess is right."""
    replies: list[str | None] | None = None
    """What a judge said of each; None without one."""
    judged: dict[str, Any] = field(default_factory=dict)
    """The judge's numbers for scores.json."""

    @property
    def correct(self) -> np.ndarray:
        """bool[N]: wholly right."""
        return self.credit >= 1

    def of(self, name: str) -> list[Any]:
        return [row["meta"].get(name) for row in self.rows]

    def marks(self) -> Marks:
        said = [None if row["options"] or row["meta"].get("open") != YES_NO else yes_or_no(row["text"]) for row in self.rows]
        return Marks(self.credit, self.valid, self.guess, [row["meta"] for row in self.rows], [row["answer"] for row in self.rows], said)


def rows_of(predictions: pa.Table) -> list[Row]:
    """The predictions' rows; UserError for one whose right answer can't be right."""
    more = [name for name in ("meta", "finished", "prompt") if name in predictions.column_names]
    rows = predictions.select(["id", "label", "options", "answer", "text", *more]).to_pylist()
    for row in rows:
        row["meta"] = json.loads(row.get("meta") or "{}")
        shown = len(row["options"])
        if shown and (not row["answer"] or row["answer"] not in LETTERS[:shown]):
            why = "it must be a letter shown"
            raise UserError(f"question {row['id']!r} has the right answer {row['answer']!r} among {shown} options", why=why)
        if not shown and not row["meta"].get("open"):
            why = "its meta names no rule to read an answer with"
            raise UserError(f"question {row['id']!r} has no options", why=why, hint="open: RULE in the keys of the data set")
    return sorted(rows, key=lambda row: row["meta"].get("rotation", 0)) if any("rotation" in row["meta"] for row in rows) else rows


def mark(rows: Sequence[Row], reader: Rule, metric: str = "accuracy", judging_by: Judging | None = None) -> Marked:
    """Reads every answer. metric: `ocrbench` reads handwritten formulas by their own rule. Without a judge no row may want one."""
    made = Marked(list(rows), [], np.zeros(len(rows), dtype=bool), np.zeros(len(rows)), np.zeros(len(rows)))

    def rule_of(row: Mapping[str, Any]) -> str:
        formula = metric == "ocrbench" and row["meta"]["open"] == CONTAINS and row["meta"].get("category") == FORMULAS
        return FORMULA if formula else row["meta"]["open"]

    def read(row: Mapping[str, Any], text: str) -> tuple[str | None, float | None]:
        """(letter, credit or None)"""
        if not row["options"]:
            return None, credit(rule_of(row), text, row["meta"].get("answers") or [row["answer"]])
        letter = reader.read(text, lettered(row["options"]))
        known = letter is not None and LETTERS.index(letter) < len(row["options"])
        return letter, float(letter == row["answer"]) if known else None

    told: dict[int, judging.Verdict] = {}
    if judging_by is not None:
        asked = [{**row, "question": judging_by.question(row)} for row in rows]
        told = judging.verdicts(judging_by.judge, judging_by.prompt, asked, lambda row, text: read(row, text)[1])
        made.replies = [told[at].reply if at in told else None for at in range(len(rows))]
        made.judged = {"asked": len(told), "unreadable": sum(one.credit is None for one in told.values())}
    for at, row in enumerate(rows):
        letter, found = None, None
        if at not in told:
            if row["meta"].get("open") != JUDGED:  # an empty answer, or a plain one
                letter, found = read(row, row["text"])
        elif told[at].text is not None:
            letter, found = read(row, told[at].text or "")
        else:
            found = told[at].credit
        made.letters.append(letter)
        made.valid[at], made.credit[at] = found is not None, found or 0.0
        made.guess[at] = 1 / len(row["options"]) if row["options"] else 0.5 if row["meta"]["open"] == YES_NO else 0.0
    return made


def told(marked: Marked) -> dict[str, Any]:
    """Numbers of parts: what each open rule made of its questions, yes/no questions, pairs, and categories where there are some."""
    parts: dict[str, Any] = {}
    kinds = ["" if row["options"] else row["meta"]["open"] for row in marked.rows]
    if any(kinds):
        parts["open"] = {kind: _part(marked, [at for at, one in enumerate(kinds) if one == kind]) for kind in sorted(set(kinds) - {""})}
    asked = [row for row, kind in zip(marked.rows, kinds) if kind == YES_NO]
    if asked:
        said = [yes_or_no(row["text"]) for row in asked]
        truth = [row["answer"].strip().lower() == "yes" for row in asked]
        parts["yes_no"] = metrics.yes_no(truth, [None if one is None else one == "yes" for one in said])
    if any(marked.of("pair")):
        parts["pairs"] = _part(marked, range(len(marked.rows)))["pairs"]
    categories = marked.of("category")
    if any(categories):
        wanted = sorted({one for one in categories if one})
        parts["by_category"] = {name: _part(marked, [at for at, one in enumerate(categories) if one == name]) for name in wanted}
    return parts


def _part(marked: Marked, at: Any) -> dict[str, Any]:
    """n, accuracy and share of readable answers of these questions; with pairs, the share of pairs that are right as a whole."""
    chosen = np.array(list(at), dtype=np.int64)
    correct, valid = marked.correct[chosen], marked.valid[chosen]
    part: dict[str, Any] = {"n": len(chosen), "accuracy": float(np.mean(correct)), "valid": float(np.mean(valid))}
    if (pairs := [marked.rows[index]["meta"].get("pair") for index in chosen]) and all(pairs):
        whole = metrics.Groups.of(pairs).all(correct)
        part["pairs"] = {"n": len(whole), "accuracy": float(np.mean(whole))}
    return part


def counted(letters: Any) -> dict[str, int]:
    return dict(sorted(Counter(letters).items()))
