"""Arms compared with the best: how far behind each one is, and whether the questions asked can tell.

In: `Results` with answers row by row. Out: two tables: averages over groups of benchmarks (paired bootstrap and sign flips), and every
benchmark by itself (the exact McNemar test). p values are corrected by Holm over the arms of a column.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from grid import stats
from grid.effects import difference
from grid.report.table import Cell, Column, Table, arm_page, benchmark_page, number, probability, rows_page, span
from grid.report.tables import marks_of, title_of
from grid.results import Arm, Results

PLAIN = ("accuracy", "circular", "ocrbench")
"""Metrics that are a share of right questions."""
FLATTERS = "the best arm was found on these same questions, which flatters it a little"


def best_of(results: Results, name: str, members: Sequence[str]) -> list[Arm]:
    """Arms with a value and all answers, the best first (the earlier of equals)."""
    known = [
        (value, arm) for arm in results.arms
        if (value := arm.value(name, results.groups)) is not None and all(arm.scores[b].answers is not None for b in members)
    ]  # fmt: skip
    return [arm for _, arm in sorted(known, key=lambda pair: -pair[0])]


def compared_table(results: Results) -> Table | None:
    """Every arm against the best one of each group's average."""
    columns = [Column("arm", numeric=False)]
    found: dict[str, dict[str, list[Cell]]] = {}
    best: dict[str, Arm] = {}
    for group, members in results.groups.items():
        order = best_of(results, group, members)
        if len(order) < 2:
            continue
        best[group], found[group] = order[0], _against(order, results, group, members)
        columns += [Column(title, title_of(group)) for title in ("behind the best", "95 % interval", "p (Holm)")]
    if not found:
        return None
    table = Table("compared", "Arms compared with the best", columns, marks=marks_of(results), folded=True)
    table.caption = f"percentage points, paired bootstrap over questions; p: differences with signs flipped at random; {FLATTERS}"
    for arm in results.arms:
        cells = [Cell(arm.name, href=arm_page(arm.name))]
        for group, rows in found.items():
            absent = [number(None, reason=arm.reason(group, results.groups)), Cell(""), Cell("")]
            cells += [Cell("best", tone="strong"), Cell(""), Cell("")] if arm is best[group] else rows.get(arm.name, absent)
        table.rows.append(cells)
    return table


def _against(order: Sequence[Arm], results: Results, group: str, members: Sequence[str]) -> dict[str, list[Cell]]:
    """arm → difference, interval and p against the first of `order`."""
    first, told = order[0], {}
    p: dict[str, float] = {}
    for arm in order[1:]:
        drawn = [difference([(first, arm)], member, []) for member in members]
        samples = [one for one in drawn if one is not None]
        if len(samples) < len(members):
            continue
        seed = zlib.crc32(f"{group}:{first.name}:{arm.name}".encode())
        told[arm.name] = stats.bootstrap(samples, seed).scaled(100.0)
        p[arm.name] = stats.sign_flip_test(samples, seed)
    adjusted = stats.holm(p)
    return {
        name: [
            number(interval.mean, "", arm_page(name), signed=True),
            Cell(span(interval.low, interval.high, True), href=arm_page(name)),
            Cell(probability(adjusted[name]), href=arm_page(name)),
        ]
        for name, interval in told.items()
    }


def benchmarks_compared(results: Results) -> Table | None:
    """Every arm against the best one of each benchmark: questions that only one of the two got right, and what chance says of them."""
    columns = [Column("benchmark", numeric=False), Column("arm", numeric=False), Column("best arm", numeric=False), Column("difference")]
    columns += [Column("this one", "only right"), Column("the best", "only right"), Column("p, exact"), Column("p (Holm)")]
    table = Table("compared-benchmarks", "Benchmark by benchmark against the best arm", columns, marks=marks_of(results), folded=True)
    table.caption = f"p: McNemar's exact test on the questions that just one of the two got right; {FLATTERS}"
    weighted = False
    for benchmark in results.benchmarks:
        order = best_of(results, benchmark, [benchmark])
        if len(order) < 2:
            continue
        lines, p = [], {}
        for arm in order[1:]:
            pair = _paired(order[0], arm, benchmark)
            if pair is None:
                continue
            lines.append((arm, *(found := stats.mcnemar(*pair))))
            p[arm.name] = found[2]
        adjusted = stats.holm(p)
        for arm, theirs, own, exact in lines:
            weighted |= arm.scores[benchmark].metric not in PLAIN
            page = rows_page(arm.name, benchmark)
            gap = arm.scores[benchmark].value - order[0].scores[benchmark].value
            told = (str(own), str(theirs), probability(exact), probability(adjusted[arm.name]))
            table.rows.append([
                Cell(title_of(benchmark), href=benchmark_page(benchmark)), Cell(arm.name, href=page),
                Cell(order[0].name, href=rows_page(order[0].name, benchmark)), number(gap, "", page, signed=True),
                *(Cell(text, href=page) for text in told),
            ])  # fmt: skip
    if weighted:
        table.notes.append(
            "where the score is mean-per-class accuracy or a benchmark's own (F1, MME), the test counts questions that are wholly right"
        )
    return table if table.rows else None


def _paired(first: Arm, second: Arm, benchmark: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Right or wrong of both on the questions that both answered, bool[N] each; None where they share none."""
    one, other = first.scores[benchmark].answers, second.scores[benchmark].answers
    assert one is not None and other is not None
    ids = one.ids if np.array_equal(one.ids, other.ids) else one.ids[np.isin(one.ids, other.ids)]
    return (one.correct[one.at(ids)], other.correct[other.at(ids)]) if ids.size else None
