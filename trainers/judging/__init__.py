"""What a judge is asked and what its replies mean, as data: `NAME.json` here is a prompt.

    grade     questions with an open answer (MM-Vet): how right it is, 0.0 to 1.0, after worked examples
    extract   the answer that a longer text gives (MathVista): read again by the set's own rule
    verdict   whether an answer says what the right one says (HallusionBench): correct, incorrect or unclear

The wordings are ours: MM-Vet's, MathVista's and HallusionBench's own prompts could not be checked where this was written, so numbers judged
here are ours, too, and say which prompt made them. A prompt's version is a hash of everything in its file that a judge reads, so that it
can't change under a name; with the judge's model it belongs to the identity of a score.

In: rows of predictions (`marking.Row`) and a `Judge`. Out: for each row that the judge was asked about a `Verdict`; None where its reply
can't be read: that answer is invalid, wrong and counted, and never asked again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from datasets_ray.answers import LETTERS, lettered
from datasets_ray.errors import UserError, nearest
from datasets_ray.open_answers import JUDGED
from trainers.judge import Judge

HERE = Path(__file__).parent
READS = ("system", "ask", "max_tokens", "reply")
_GRADE = re.compile(r"(?<![\d.])(?:0(?:\.\d+)?|1(?:\.0+)?|\.\d+)(?![\d.]*\d)")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """reply: what the judge said. credit: how right the answer is, 0 to 1; None where the reply can't be read. text: for `extract`, what
    the answer rule reads in place of the answer."""

    reply: str
    credit: float | None = None
    text: str | None = None


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.json"))


@lru_cache(maxsize=16)
def prompt(name: str) -> dict[str, Any]:
    """The whole file. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"no judge's prompt {name!r}", hint=nearest(name, names()))
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def identity(model: str, name: str) -> dict[str, str]:
    """What of a judge belongs to a score's identity: model, prompt and its version; neither address nor key."""
    read = json.dumps({key: prompt(name)[key] for key in READS}, sort_keys=True)
    return {"model": model, "prompt": name, "version": hashlib.sha256(read.encode()).hexdigest()[:12]}


def conversation(name: str, row: Row) -> list[dict[str, str]]:
    """The messages about one answer."""
    asked = prompt(name)
    answers = row["meta"].get("answers") or [row["answer"]]
    listed = "".join(f"\n{letter}. {option}" for letter, option in lettered(row["options"]).items())
    told = {"question": (row.get("question") or "").strip() + listed, "right": " / ".join(map(str, answers)), "answer": row["text"].strip()}
    words = re.sub(r"\{(question|right|answer)\}", lambda found: told[found[1]], asked["ask"])
    return [{"role": "system", "content": asked["system"]}, {"role": "user", "content": words}]


def _graded(reply: str, row: Row, read: Callable[[str], float | None]) -> Verdict:
    found = _GRADE.findall(reply)
    return Verdict(reply, float(found[0]) if len(found) == 1 else None)


def _told(reply: str, row: Row, read: Callable[[str], float | None]) -> Verdict:
    words = set(re.findall(r"[a-z]+", reply.lower())) & {"correct", "incorrect", "unclear"}
    said = words.pop() if len(words) == 1 else ""
    return Verdict(reply, {"correct": 1.0, "incorrect": 0.0}.get(said))


def _extracted(reply: str, row: Row, read: Callable[[str], float | None]) -> Verdict:
    text = reply.strip().strip("`\"' \n")
    text = "" if text.lower().rstrip(".") == "none" else text
    return Verdict(reply, read(text) if text else None, text)


REPLIES: dict[str, Callable[..., Verdict]] = {"grade": _graded, "verdict": _told, "extract": _extracted}


def plain(row: Row, read: Callable[[str], float | None]) -> bool:
    """Whether an answer needs nothing taken out of it: a letter or an option by itself, a number by itself, the right text itself."""
    said = row["text"].strip()
    if row["options"]:
        return said in LETTERS[: len(row["options"])] or said in row["options"]
    if row["meta"].get("open") == "number":
        return re.fullmatch(r"[-+]?[\d,]*\.?\d+", said) is not None
    return bool(read(said))


def verdicts(judge: Judge, name: str, rows: Sequence[Row], read: Callable[[Row, str], float | None]) -> dict[int, Verdict]:
    """Row number → what the judge made of it. read: how right a text is as an answer to a row by the set's own rule. Not asked about: an
    empty answer, and with `extract` one that is plain already."""
    asked = [at for at, row in enumerate(rows) if row["text"].strip()]
    if name == "extract":
        asked = [at for at in asked if not plain(rows[at], partial(read, rows[at]))]
    kind = REPLIES[prompt(name)["reply"]]
    replies = judge.ask([conversation(name, rows[at]) for at in asked], int(prompt(name)["max_tokens"]))
    return {at: kind(reply.text, rows[at], partial(read, rows[at])) for at, reply in zip(asked, replies)}


def must_judge(rows: Sequence[Row]) -> int:
    """How many questions no rule can score."""
    return sum(not row["options"] and row["meta"].get("open") == JUDGED for row in rows)
