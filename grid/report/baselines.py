"""What a model's numbers are held against: the same model with images permuted, and its encoder as a zero-shot classifier.

In: `Results` of a run. Out: `Table`s, each None where the run has nothing of the kind.
"""

from __future__ import annotations

import numpy as np

from grid import stats
from grid.report.table import Cell, Column, Table, benchmark_page, control_page, encoder_page, number, plain, rows_page
from grid.report.tables import marks_of, title_of
from grid.results import Results, Score


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
        "pooled: a question answered by several arms counts once, with their mean; mined options lie around the right one, which alone can "
        "lift a set above chance",
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
                page = control_page(arm.name, benchmark)
                table.rows.append(_against_chance(arm.name, benchmark, len(answers), correct, guess, straight, page=page))
    for benchmark, given in pooled.items():
        if len(given) > 1 and all(np.array_equal(ids, given[0][0]) for ids, _, _ in given):
            each = np.array([correct for _, correct, _ in given])
            known = ~np.isnan(each).all(axis=0)
            mean = np.nanmean(each[:, known], axis=0)
            all_of = f"all {len(given)} arms"
            page = benchmark_page(benchmark)
            table.rows.append(_against_chance(all_of, benchmark, known.size, mean, given[0][2][known], None, spread=True, page=page))
    tested = sum(1 for cells in table.rows if not cells[0].text.startswith("all "))
    if tested:
        table.notes.append(f"{tested} comparisons: about {plain(0.0455 * tested)} lie outside two standard errors by chance alone")
    return table if table.rows else None


def _against_chance(
    name: str, benchmark: str, asked: int, correct: np.ndarray, options: np.ndarray, straight: float | None, spread: bool = False,
    page: str = "",
) -> list[Cell]:  # fmt: skip
    error, z = stats.z_against_chance(correct, options)
    if spread and correct.size > 1:
        error = float(np.std(correct - options, ddof=1) / np.sqrt(correct.size))
        z = float(np.mean(correct - options) / error) if error > 0 else float("nan")
    inside = abs(z) <= 2
    return [
        Cell(name),
        Cell(title_of(benchmark), href=benchmark_page(benchmark)),
        Cell(str(asked), href=page),
        Cell(str(correct.size), href=page),
        number(100 * float(correct.mean()), href=page),
        number(100 * float(options.mean()), href=page),
        number(100 * error, href=page),
        number(straight, href=rows_page(name, benchmark)),
        number(z, "", page, signed=True, digits=2),
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
            own, all_arms = encoder_page(found["stage"]), benchmark_page(benchmark)
            theirs = rows_page(best, benchmark) if best else ""
            table.rows.append([
                Cell(arm.axes.get("encoder", arm.name)), Cell(title_of(benchmark), href=all_arms), Cell(str(found.get("n", "")), href=own),
                *(number(_points(found.get(share)), href=own) for share in ("top1", "top5", "mean_per_class", "among_choices")),
                number(values[best] if best else None, href=theirs), Cell(best or "–", href=theirs), number(mean, href=all_arms),
                number(None if best is None or among is None else values[best] - among, "", theirs, signed=True),
                number(None if mean is None or among is None else mean - among, "", all_arms, signed=True),
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
