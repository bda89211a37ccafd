"""Why answers are invalid, by benchmark: what the texts say in which the answer rule found no option.

In: `Results` of a run, whose scores count their invalid answers by reason (datasets_ray.invalid). Out: a `Table`, and half a sentence.
"""

from __future__ import annotations

from collections import Counter

from grid.report.table import Cell, Column, Table, benchmark_page, number, plain, rows_page
from grid.report.tables import marks_of, title_of
from grid.results import Arm, Results


def invalid_table(results: Results) -> Table | None:
    """One row per benchmark over all arms; None where every answer is valid."""
    counts = {benchmark: _counts(results, benchmark) for benchmark in results.benchmarks}
    reasons = [reason for reason, _ in sum(counts.values(), Counter[str]()).most_common()]
    if not reasons:
        return None
    columns = [Column("benchmark", numeric=False), Column("answers"), Column("invalid"), Column("%", "invalid")]
    columns += [Column(reason, "of these, the text says") for reason in reasons]
    columns += [Column("arm", "most invalid answers", numeric=False), Column("%", "most invalid answers")]
    columns += [Column("for example", numeric=False)]
    table = Table(
        "invalid",
        "Why answers are invalid",
        columns,
        marks=marks_of(results),
        caption="all arms together; percentages of a benchmark's invalid answers. An invalid answer counts as wrong, never as a guess",
    )
    for benchmark, found in counts.items():
        arms = [arm for arm in results.arms if benchmark in arm.scores and arm.scores[benchmark].valid is not None]
        asked, total = sum(arm.scores[benchmark].n or 0 for arm in arms), sum(found.values())
        if not total:
            continue
        worst = min(arms, key=lambda arm: arm.scores[benchmark].valid or 0.0)
        page, theirs = benchmark_page(benchmark), rows_page(worst.name, benchmark)
        table.rows.append([
            Cell(title_of(benchmark), href=page), Cell(str(asked), href=page), Cell(str(total), href=page),
            number(100 * total / asked, href=page), *(number(100 * found[reason] / total, href=page) for reason in reasons),
            Cell(worst.name, href=theirs), number(100 - 100 * (worst.scores[benchmark].valid or 0.0), href=theirs),
            Cell(_example(worst, benchmark)),
        ])  # fmt: skip
    return table


def because(results: Results) -> str:
    """`; 97.0 % of the others say an option of other questions`, or nothing."""
    found = sum((_counts(results, benchmark) for benchmark in results.benchmarks), Counter[str]())
    if not found:
        return ""
    reason, count = found.most_common(1)[0]
    return f"; of the others {plain(100 * count / found.total())} % say {reason}"


def _counts(results: Results, benchmark: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for arm in results.arms:
        if benchmark in arm.scores:
            found.update(arm.scores[benchmark].invalid.get("counts", {}))
    return found


def _example(arm: Arm, benchmark: str) -> str:
    """The commonest kind of this arm's invalid answers, with what was asked for."""
    invalid = arm.scores[benchmark].invalid
    if not invalid.get("counts"):
        return ""
    example = invalid["examples"][max(invalid["counts"], key=invalid["counts"].__getitem__)]
    return f"“{example['text']}” for {' / '.join(example['options'])}"
