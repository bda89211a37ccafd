"""What the numbers rest on: questions, validity, chance and controls, the encoders' own scores.

In: `Results` of a run. Out: `Table`s, each None where the run has nothing of the kind.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from grid import stats
from grid.report.table import Cell, Column, Table, confusions_page, number, plain, rows_page, span
from grid.report.tables import marks_of, title_of
from grid.results import PER_CLASS, Arm, Results, Score

CLEAR = 15.0
"""Points above chance that an arm must reach to count as having learned (with an interval clear of chance)."""


@lru_cache(maxsize=4096)
def score_interval(score: Score) -> stats.Interval | None:
    """Points: Wilson for accuracy, bootstrap within classes for mean-per-class; None without answers."""
    answers = score.answers
    if answers is None or not len(answers):
        return None
    if score.metric == PER_CLASS:
        return stats.bootstrap([stats.sample(answers.correct, answers.labels)], seed=0).scaled(100.0)
    return stats.wilson(int(answers.correct.sum()), len(answers)).scaled(100.0)


def group_chance(arm: Arm, names: tuple[str, ...]) -> float | None:
    known = [arm.scores[b].chance for b in names if b in arm.scores]
    values = [c for c in known if c is not None]
    return float(np.mean(values)) if len(values) == len(names) and values else None


def clear_of_chance(results: Results, margin: float = CLEAR) -> dict[str, list[str]]:
    """benchmark → arms that answer `margin` points or more above chance with the whole interval above it."""
    found: dict[str, list[str]] = {}
    for benchmark in results.benchmarks:
        found[benchmark] = []
        for arm in results.arms:
            score = arm.scores.get(benchmark)
            interval = score_interval(score) if score else None
            if score and score.chance is not None and interval and score.value >= score.chance + margin and interval.low > score.chance:
                found[benchmark].append(arm.name)
    return found


def benchmarks_table(results: Results) -> Table | None:
    """One row per benchmark: what is asked, how it is counted, and how many arms are clear of chance."""
    columns = [
        Column("benchmark", numeric=False),
        Column("average", numeric=False),
        Column("metric", numeric=False),
        Column("questions"),
        Column("classes"),
        Column("chance"),
        Column("answer rule", numeric=False),
        Column("least", "valid answers"),
        Column("mean", "valid answers"),
        Column("best arm", numeric=False),
        Column("best"),
        Column(f"arms ≥ {CLEAR:.0f} above chance"),
    ]
    table = Table(
        "benchmarks",
        "Benchmarks",
        columns,
        marks=marks_of(results),
        caption="valid: an answer could be read off the text; an invalid answer counts as wrong, never as a guess",
    )
    clear = clear_of_chance(results)
    for benchmark in results.benchmarks:
        scores = [(arm, arm.scores[benchmark]) for arm in results.arms if benchmark in arm.scores]
        if not scores or scores[0][1].n is None:
            continue
        group = next((title_of(g) for g, members in results.groups.items() if benchmark in members), "none")
        first, valid = scores[0][1], [s.valid for _, s in scores if s.valid is not None]
        best, top = max(scores, key=lambda pair: pair[1].value)
        counts = sorted({s.n for _, s in scores if s.n is not None})
        classes = len(np.unique(first.answers.labels)) if first.answers is not None else None
        table.rows.append([
            Cell(title_of(benchmark), href=confusions_page(benchmark)),
            Cell(group),
            Cell(first.metric.replace("_", " ")),
            Cell("–".join(str(c) for c in {counts[0]: 0, counts[-1]: 0})),
            Cell(str(classes) if classes and classes > 1 else "–"),
            number(first.chance),
            Cell(first.read_by),
            number(100 * min(valid) if valid else None, tone="warn" if valid and min(valid) < 0.95 else ""),
            number(100 * float(np.mean(valid)) if valid else None),
            Cell(best.name, href=rows_page(best.name, benchmark)),
            number(top.value),
            Cell(f"{len(clear[benchmark])} of {len(scores)}"),
        ])
        if benchmark in results.partial:
            table.notes.append(f"{title_of(benchmark)}: {results.partial[benchmark]}; not comparable with numbers over the whole set")
        invalid = [f"{arm.name} {plain(100 * s.valid)} %" for arm, s in scores if s.valid is not None and s.valid < 0.95]
        if invalid:
            table.notes.append(f"{title_of(benchmark)}: under 95 % valid answers: {', '.join(invalid)}; the rest names no option")
    return table if table.rows else None


def detail_table(results: Results) -> Table | None:
    """Every score of every arm with n, interval, validity and distance from chance."""
    columns = [
        Column("arm", numeric=False),
        Column("benchmark", numeric=False),
        Column("value"),
        Column("± se"),
        Column("95 % interval"),
        Column("n"),
        Column("valid %"),
        Column("above chance"),
        Column("z"),
    ]
    table = Table(
        "detail",
        "Every score",
        columns,
        marks=marks_of(results),
        folded=True,
        caption="intervals: Wilson for accuracy, bootstrap within classes for mean-per-class; z: against chance, under chance's own error",
    )
    for arm in results.arms:
        for benchmark in results.benchmarks:
            score = arm.scores.get(benchmark)
            if score is None or score.answers is None:
                continue
            interval = score_interval(score)
            _, z = stats.z_against_chance(score.answers.correct, score.answers.guess)
            table.rows.append([
                Cell(arm.name),
                Cell(title_of(benchmark)),
                number(score.value, href=rows_page(arm.name, benchmark)),
                number(score.stderr),
                Cell(span(interval.low, interval.high) if interval else "–"),
                Cell(str(score.n)),
                number(None if score.valid is None else 100 * score.valid),
                number(None if score.chance is None else score.value - score.chance, signed=True),
                number(z, signed=True),
            ])
    return table if table.rows else None


def seeds_table(results: Results) -> Table | None:
    """Arms that repeat a recipe with other seeds: what the seed alone moves. None where no recipe is repeated."""
    names = list(results.groups) or results.benchmarks
    columns = [Column("arms", numeric=False), Column("seeds")]
    columns += [Column(title, title_of(name)) for name in names for title in ("mean", "± sd", "least", "most")]
    table = Table(
        "seeds", "Spread over training seeds", columns, marks=marks_of(results), caption="± sd: sample standard deviation between seeds"
    )
    recipes: dict[tuple[object, ...], list[Arm]] = {}
    for arm in results.arms:
        recipes.setdefault((arm.source, arm.init, *sorted(arm.axes.items())), []).append(arm)
    for arms in recipes.values():
        if len({arm.seed for arm in arms}) < 2:
            continue
        cells = [Cell(", ".join(arm.name for arm in arms)), Cell(str(len(arms)))]
        for name in names:
            values = [value for arm in arms if (value := arm.value(name, results.groups)) is not None]
            if values:
                spread = stats.seed_spread(values)
                cells += [number(spread.mean), number(spread.deviation, reason="one run"), number(spread.low), number(spread.high)]
            else:
                cells += [number(None, reason="no score")] * 4
        table.rows.append(cells)
    return table if table.rows else None


def control_table(results: Results) -> Table | None:
    """The same models asked with images permuted among questions: what is left is what the text alone gives away."""
    columns = [
        Column("arm", numeric=False),
        Column("benchmark", numeric=False),
        Column("questions"),
        Column("valid", "permuted"),
        Column("right of these", "permuted"),
        Column("chance", "permuted"),
        Column("± se of chance", "permuted"),
        Column("own images", "right of the valid"),
        Column("z"),
        Column("within 2 se", numeric=False),
    ]
    table = Table(
        "control",
        "Control: images permuted among questions",
        columns,
        marks=marks_of(results),
        caption="accuracy over valid answers, since an invalid one can't be right by chance; chance: one over the options shown; "
        "pooled: a question answered by several arms counts once, with their mean",
    )
    pooled: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for arm in results.arms:
        for benchmark, control in arm.controls.items():
            if control.answers is None or not len(control.answers):
                continue
            answers, own = control.answers, arm.scores.get(benchmark)
            known = answers.valid
            pooled.setdefault(benchmark, []).append((answers.ids, np.where(known, answers.correct, np.nan), answers.guess))
            straight = None
            if own is not None and own.answers is not None and own.answers.valid.any():
                straight = 100 * float(own.answers.correct[own.answers.valid].mean())
            if known.any():
                correct, guess = answers.correct[known].astype(float), answers.guess[known]
                table.rows.append(_against_chance(arm.name, benchmark, len(answers), correct, guess, straight))
    for benchmark, given in pooled.items():
        if len(given) > 1 and all(np.array_equal(ids, given[0][0]) for ids, _, _ in given):
            each = np.array([correct for _, correct, _ in given])
            known = ~np.isnan(each).all(axis=0)
            mean = np.nanmean(each[:, known], axis=0)
            table.rows.append(_against_chance(f"all {len(given)} arms", benchmark, known.size, mean, given[0][2][known], None, spread=True))
    tested = sum(1 for cells in table.rows if not cells[0].text.startswith("all "))
    if tested:
        table.notes.append(f"{tested} comparisons: about {plain(0.0455 * tested)} lie outside two standard errors by chance alone")
    return table if table.rows else None


def _against_chance(
    name: str, benchmark: str, asked: int, correct: np.ndarray, options: np.ndarray, straight: float | None, spread: bool = False
) -> list[Cell]:
    error, z = stats.z_against_chance(correct, options)
    if spread and correct.size > 1:
        error = float(np.std(correct - options, ddof=1) / np.sqrt(correct.size))
        z = float(np.mean(correct - options) / error) if error > 0 else float("nan")
    inside = abs(z) <= 2
    return [
        Cell(name),
        Cell(title_of(benchmark)),
        Cell(str(asked)),
        Cell(str(correct.size)),
        number(100 * float(correct.mean())),
        number(100 * float(options.mean())),
        number(100 * error),
        number(straight),
        number(z, signed=True, digits=2),
        Cell("yes" if inside else "no", tone="" if inside else "warn"),
    ]


def zeroshot_table(results: Results) -> Table | None:
    """Each encoder on its own, by zero-shot classification, and how far the best and the mean VLM with it stay behind."""
    columns = [
        Column("encoder", numeric=False),
        Column("benchmark", numeric=False),
        Column("n"),
        Column("top 1", "all classes"),
        Column("top 5", "all classes"),
        Column("per class", "all classes"),
        Column("among the options"),
        Column("best", "VLMs with it"),
        Column("arm", "VLMs with it", numeric=False),
        Column("mean", "VLMs with it"),
        Column("gap of the best"),
        Column("gap of the mean"),
    ]
    table = Table(
        "zeroshot",
        "The encoders alone (CLIP zero-shot) and what is left of it in the VLM",
        columns,
        marks=marks_of(results),
        caption="cosine of image and class texts; gap: VLM − encoder among the same options, percentage points, both as accuracy",
    )
    seen: set[str] = set()
    texts: dict[str, list[str]] = {}
    for arm in results.arms:
        for benchmark, found in arm.zeroshot.items():
            if found["stage"] in seen:
                continue
            seen.add(found["stage"])
            texts.setdefault(_texts(found.get("template")), []).append(title_of(benchmark))
            users = [a for a in results.arms if a.zeroshot.get(benchmark, {}).get("stage") == found["stage"] and benchmark in a.scores]
            values = {a.name: _accuracy(a.scores[benchmark]) for a in users}
            among = _points(found.get("among_choices"))
            best = max(values, key=lambda name: values[name]) if values else None
            mean = float(np.mean(list(values.values()))) if values else None
            table.rows.append([
                Cell(arm.axes.get("encoder", arm.name)), Cell(title_of(benchmark)), Cell(str(found.get("n", ""))),
                *(number(_points(found.get(share))) for share in ("top1", "top5", "mean_per_class", "among_choices")),
                number(values[best] if best else None), Cell(best or "–", href=rows_page(best, benchmark) if best else ""), number(mean),
                number(None if best is None or among is None else values[best] - among, signed=True),
                number(None if mean is None or among is None else mean - among, signed=True),
            ])  # fmt: skip
    for said, benchmarks in texts.items():
        named = f" ({', '.join(dict.fromkeys(benchmarks))})" if len(texts) > 1 else ""
        table.notes.append(f"class texts: {said}{named}")
    return table if table.rows else None


def _texts(template: str | list[str] | None) -> str:
    """How a zero-shot classifier writes a class."""
    if not template or isinstance(template, str) or len(template) == 1:
        one = template[0] if isinstance(template, list) and template else template
        return f"“{one}”" if one else "not recorded"
    return f"the mean of {len(template)} texts, the first “{template[0]}”"


def _accuracy(score: Score) -> float:
    return score.value if score.answers is None else 100 * float(score.answers.correct.mean())


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share
