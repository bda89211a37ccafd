"""Scores of benchmarks that are no plain share of right answers: MME, POPE's F1, HallusionBench, OCRBench, VQA, judged grades.

In: `Marks`, what was read of every answer. Out: `Points`: a share for each question whose mean (within strata first, where there are some)
is the score, so that one way of resampling and pairing serves all of them; the numbers that go with it; what guessing gets.

A score that is a ratio (F1, the mean of three accuracies over different groups) is written as the mean of its linearised terms: the ratio
plus the unit's residual over the mean denominator. Their mean is the ratio itself, their spread its standard error to first order (the
delta method; Cochran 1977, "Sampling Techniques", section 6.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datasets_ray.errors import UserError
from datasets_ray.hallusion_places import TOGETHER

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""MME's subtasks (Fu et al. 2023), 200 points each: 2,000 and 800."""
SUBTASK = 200
OPEN = "an answer without options: there is nothing to guess among"


@dataclass(frozen=True)
class Marks:
    """What was read of N answers; all have length N."""

    credit: np.ndarray
    """float[N]: how right it is, 0 to 1."""
    valid: np.ndarray
    """bool[N]"""
    guess: np.ndarray
    """float[N]: how likely a guess is right; 0 where there is nothing to guess among."""
    metas: Sequence[Mapping[str, Any]]
    truth: Sequence[str]
    said: Sequence[str | None]
    """yes | no where a question wants one of them and got it, else None."""

    def __len__(self) -> int:
        return len(self.credit)

    @property
    def correct(self) -> np.ndarray:
        """bool[N]: wholly right."""
        return self.credit >= 1

    def of(self, name: str) -> list[str]:
        return [str(meta.get(name) or "") for meta in self.metas]

    def needed(self, metric: str, name: str, hint: str) -> list[str]:
        """The questions' values of a key of their meta; UserError where one has none."""
        missing = sum(name not in meta or meta[name] in (None, "") for meta in self.metas)
        if missing:
            raise UserError(f"metric {metric!r}, and {missing} of {len(self)} questions have no {name!r} in their meta", hint=hint)
        return [str(meta[name]) for meta in self.metas]


@dataclass(frozen=True)
class Points:
    """A score as a mean. share: float[N]. unit: questions that are drawn together have one name, and one share; empty: each by itself.
    stratum: the mean is taken within each and then over them; empty: over all."""

    share: np.ndarray
    unit: Sequence[str] = ()
    stratum: Sequence[str] = ()
    told: Mapping[str, Any] = field(default_factory=dict)
    """Numbers beside, as scores.json has them; `said`: how a table's cell names the score."""
    chance: float | None = None
    """What guessing gets, as a share."""
    no_chance: str = ""
    """Why there is no chance level."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """What counts nowhere, by reason."""

    def units(self) -> tuple[np.ndarray, np.ndarray]:
        """(share float[U], stratum int[U]) of each unit in the order of first appearance."""
        share, stratum = np.asarray(self.share, dtype=np.float64), np.zeros(len(self.share), dtype=np.int64)
        if len(self.stratum):
            stratum = np.unique(np.asarray(self.stratum, dtype=np.str_), return_inverse=True)[1]
        if not len(self.unit):
            return share, stratum
        first = list({name: at for at, name in reversed(list(enumerate(self.unit)))}.values())[::-1]
        return share[first], stratum[first]

    @property
    def value(self) -> float:
        share, stratum = self.units()
        counts = np.bincount(stratum)
        return float(np.mean(np.bincount(stratum, weights=share)[counts > 0] / counts[counts > 0]))

    @property
    def error(self) -> float | None:
        """Units are independent, strata too: sqrt(sum_c s_c^2 / n_c) / C; None where a stratum's one unit can't tell."""
        share, stratum = self.units()
        parts = [share[stratum == one] for one in np.unique(stratum)]
        if any(part.size < 2 for part in parts):
            return None
        return float(math.sqrt(sum(float(np.var(part, ddof=1)) / part.size for part in parts)) / len(parts))


def _ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, np.ndarray]:
    """(sum of above over sum of below, its linearised terms float[N] whose mean it is)"""
    value = float(above.sum() / below.sum())
    return value, value + (above - value * below) / below.mean()


def yes_no(truth: Sequence[bool] | np.ndarray, said: Sequence[bool | None], weight: np.ndarray | None = None) -> dict[str, float]:
    """Shares over yes/no questions, `yes` being positive (POPE): accuracy, precision, recall, f1, and how often yes is said.

    said: None where the answer is neither or both; it is wrong in accuracy and no `yes` (VLMEvalKit's `YOrN_Eval`). weight: float[N].
    """
    right, given = np.asarray(truth, dtype=bool), np.array([bool(one) for one in said], dtype=bool)
    if len(right) == 0:
        raise UserError("no questions to score", why="a metric over nothing is not zero", hint="look at the dataset stage's dropped rows")
    weights = np.ones(len(right)) if weight is None else weight
    readable = np.array([one is not None for one in said], dtype=bool)
    both = float(weights[right & given].sum())
    precision = both / float(weights[given].sum()) if given.any() else 0.0
    recall = both / float(weights[right].sum()) if right.any() else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    accuracy = float(weights[(right == given) & readable].sum() / weights.sum())
    share = float(weights[given].sum() / weights.sum())
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "yes_share": share}


def f1(marks: Marks) -> Points:
    """POPE: F1 of `yes` over all questions; a question in several categories (`adversarial,popular`) counts in each, as in VLMEvalKit.

    The authors' script reads the first sentence: `no` where it has "No", "no" or "not" as a word, else `yes`, so what says neither is a
    `yes` there. Here an answer is read by the rule `yes_no`; one that says neither or both is invalid: wrong in accuracy, no `yes` in
    precision and a miss in recall. lmms-eval's yes share counts the right answers; here it counts the answers given. The error takes
    questions as independent, though POPE asks six of each image.
    """
    truth = np.array([one.strip().lower() == "yes" for one in marks.truth])
    if not truth.any() or any(one.strip().lower() not in ("yes", "no") for one in marks.truth):
        why = "and at least one whose answer is yes"
        raise UserError("metric 'f1' wants questions answered by yes or no", why=why, hint="open: yes_no in the keys of the data set")
    categories = [[part.strip() for part in name.split(",") if part.strip()] or [""] for name in marks.of("category")]
    weight = np.array([len(parts) for parts in categories], dtype=np.float64)
    said = [None if one is None else one == "yes" for one in marks.said]
    given = np.array([one == "yes" for one in marks.said])
    _, share = _ratio(2.0 * weight * (truth & given), weight * (truth.astype(float) + given))
    told: dict[str, Any] = {**yes_no(truth, said, weight), "invalid": int((~marks.valid).sum())}
    each = {}
    for name in sorted({part for parts in categories for part in parts} - {""}):
        at = [index for index, parts in enumerate(categories) if name in parts]
        each[name] = {"n": len(at), **yes_no(truth[at], [said[index] for index in at])}
    if each:
        told["by_category"] = each
        told["mean_of_categories"] = float(np.mean([part["f1"] for part in each.values()]))
    yes, total = float((weight * truth).sum()), float(weight.sum())
    return Points(share, told={"f1": told, "said": "F1"}, chance=yes / (yes + total / 2))  # of expected counts, yes half of the time


def mme(marks: Marks) -> Points:
    """MME: for each subtask the accuracy over questions plus that over images with both questions right, 200 points at most; perception
    (10 subtasks), cognition (4) and their total of 2,800. The score is the total as a share of what the subtasks asked can give.

    Subtasks are strata, an image is a unit of share (accuracy + both right) / 2. The authors' script reads the first four characters;
    here the rule is `yes_no`, and what can't be read is invalid and wrong.
    """
    hint = "pair: [category, image_path] in the keys of the data set"
    pairs, tasks = marks.needed("mme", "pair", hint), marks.needed("mme", "category", "MME's TSV names the subtask in `category`")
    places: dict[str, list[int]] = {}
    for at, pair in enumerate(pairs):
        places.setdefault(pair, []).append(at)
    odd = [pair for pair, at in places.items() if len(at) != 2 or tasks[at[0]] != tasks[at[1]]]
    if odd:
        raise UserError(f"{len(odd)} images of MME don't have two questions of one subtask, first {odd[0]!r}", hint=hint)
    share, guess = np.zeros(len(marks)), np.zeros(len(marks))
    for both_of in places.values():
        share[both_of] = (marks.correct[both_of].mean() + marks.correct[both_of].all()) / 2
        guess[both_of] = (marks.guess[both_of].mean() + marks.guess[both_of].prod()) / 2
    subtasks, by_luck = {}, []
    for task in sorted(set(tasks)):
        own = np.array([one == task for one in tasks])
        both = float(np.mean([marks.correct[at].all() for pair, at in places.items() if tasks[at[0]] == task]))
        accuracy = float(marks.correct[own].mean())
        subtasks[task] = {"n": int(own.sum()), "accuracy": accuracy, "both": both, "points": 100 * (accuracy + both)}
        by_luck.append(float(guess[own].mean()))
    total, most = sum(part["points"] for part in subtasks.values()), SUBTASK * len(subtasks)
    told: dict[str, Any] = {"subtasks": subtasks, "total": total, "of": most}
    for name, group in (("perception", PERCEPTION), ("cognition", COGNITION)):
        there = [task for task in group if task in subtasks]
        told[name] = {"points": sum(subtasks[task]["points"] for task in there), "of": SUBTASK * len(there)}
    return Points(share, pairs, tasks, {"mme": told, "said": f"{total:.1f} of {most}"}, float(np.mean(by_luck)))


def hallusion(marks: Marks) -> Points:
    """HallusionBench: aAcc over questions, fAcc over figures and qAcc over question pairs with all of theirs right; the score is the mean
    of the three, as the OpenVLM leaderboard ranks by. A set of figures is a unit: both groupings lie inside it.

    Figures and pairs are told apart by category, subcategory, set and figure or question, as in the authors' script; VLMEvalKit leaves the
    category out. As there, a question of category VS without a figure (figure 0) counts in no figure; a "can't tell" to it, which the
    authors' judge takes as right, is invalid here. Both scripts take the answers they find for all there are; here a figure or pair of
    which a question was dropped (fewer than its meta's `figure_questions` or `pair_questions`) is left out and counted: it would be easier.
    """
    hint = "VLMEvalKit's HallusionBench.tsv, or columns set_id, figure_id and question_id"
    numbers = {name: marks.needed("hallusion", name, hint) for name in ("set_id", "figure_id", "question_id")}
    kinds = ["/".join(parts) for parts in zip(marks.of("category"), marks.of("l2_category"))]
    sets = [f"{kind}/{number}" for kind, number in zip(kinds, numbers["set_id"])]
    pictured = np.array([not (c == "VS" and figure == "0") for c, figure in zip(marks.of("category"), numbers["figure_id"])])
    keys = {
        "aAcc": [str(at) for at in range(len(marks))],
        "fAcc": [f"{one}/{figure}" if seen else "" for one, figure, seen in zip(sets, numbers["figure_id"], pictured)],
        "qAcc": [f"{one}/{question}" for one, question in zip(sets, numbers["question_id"])],
    }
    names = list(dict.fromkeys(sets))
    place = {name: at for at, name in enumerate(names)}
    told: dict[str, Any] = {}
    left_out: dict[str, int] = {}
    shares, luck = [], []
    for name, key in keys.items():
        found: dict[str, list[int]] = {}
        for at, one in enumerate(key):
            if one:
                found.setdefault(one, []).append(at)
        if not found:
            raise UserError("metric 'hallusion', and no question has a figure", hint=hint)
        what, size = {"fAcc": ("figure", TOGETHER[0]), "qAcc": ("pair", TOGETHER[1])}.get(name, ("question", ""))
        members = {one: group for one, group in found.items() if len(group) >= int(marks.metas[group[0]].get(size) or 1)}
        if not members:
            raise UserError(f"metric 'hallusion', and each {what} lacks a question", hint="look at the dataset stage's dropped rows")
        if len(members) < len(found):
            left_out[f"{name}: a question of the {what} was dropped"] = len(found) - len(members)
        above, below = np.zeros(len(names)), np.zeros(len(names))
        for group in members.values():
            above[place[sets[group[0]]]] += bool(marks.correct[group].all())
            below[place[sets[group[0]]]] += 1
        value, terms = _ratio(above, below)
        told[name] = {"n": len(members), "right": int(above.sum()), "accuracy": value}
        shares.append(terms)
        luck.append(float(np.mean([marks.guess[group].prod() for group in members.values()])))
    by_set = np.mean(shares, axis=0)
    said = "mean of " + ", ".join(f"{name} {100 * part['accuracy']:.1f}" for name, part in told.items())
    share = by_set[[place[one] for one in sets]]
    return Points(share, sets, (), {"hallusion": told, "said": said}, float(np.mean(luck)), left_out=left_out)


def ocrbench(marks: Marks) -> Points:
    """OCRBench: a point for each answer that contains a right one, of 1,000; by category. Rule `formula` reads handwritten formulas."""
    categories = marks.needed("ocrbench", "category", "OCRBench's TSV names it")
    parts = {}
    for name in sorted(set(categories)):
        own = marks.correct[[one == name for one in categories]]
        parts[name] = {"right": int(own.sum()), "of": int(own.size)}
    right = int(marks.correct.sum())
    told = {"total": right, "of": len(marks), "categories": parts}
    return Points(marks.correct.astype(float), told={"ocrbench": told, "said": f"{right} of {len(marks)}"}, no_chance=OPEN)


def vqa(marks: Marks) -> Points:
    """VQA accuracy: the mean agreement with the annotators (datasets_ray.vqa_text)."""
    return Points(marks.credit, told={"wholly_right": float(marks.correct.mean()), "said": "VQA accuracy"}, no_chance=OPEN)


def graded(marks: Marks) -> Points:
    """The mean of a judge's grades between 0 and 1 (MM-Vet), by each ability that a question needs (`ocr,math` counts in both) and by
    each combination of them."""
    combined = marks.of("category")
    told: dict[str, Any] = {"wholly_right": float(marks.correct.mean()), "said": "mean grade"}
    groups = {"by_ability": [[part.strip() for part in name.split(",")] for name in combined], "by_combination": [[n] for n in combined]}
    for title, members in groups.items():
        names = sorted({part for parts in members for part in parts if part})
        held = {name: np.array([name in parts for parts in members]) for name in names}
        if names:
            told[title] = {name: {"n": int(own.sum()), "mean": float(marks.credit[own].mean())} for name, own in held.items()}
    return Points(marks.credit, told=told, no_chance=OPEN)


SETS: dict[str, Callable[[Marks], Points]] = {
    "mme": mme, "f1": f1, "hallusion": hallusion, "ocrbench": ocrbench, "vqa": vqa, "graded": graded,
}  # fmt: skip
"""Metric → what it makes of the marks. Its score stands in percentage points of what can be reached, like every other."""
