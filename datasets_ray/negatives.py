"""Which wrong labels stand beside the right one: a similarity matrix or human annotations in, k labels a row out.

The choice is FOCI's (Geigle et al. 2024, `benchmark/data/options_generation.py`): the right label first, then the k - 1 most similar
others in ascending similarity, so the hardest is last. FOCI's sort (numpy's default) leaves equal similarities in any order; here it is
stable: among equals the label that comes later in the class list is the harder one, and ties are counted. A class name that occurs twice
is one label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from datasets_ray.answers import LETTERS
from datasets_ray.errors import UserError, nearest

CHUNK = 4096
"""Rows sorted at a time: bounds the memory of an ImageNet-sized matrix (50,000 x 1,000)."""


@dataclass(frozen=True)
class Negatives:
    """options: a list of k names a row, right one first, negatives in ascending difficulty. The rest counts what had to be decided."""

    options: list[list[str]]
    kept: np.ndarray
    """int64[len(options)]: the input row of each."""
    ties_at_the_cut: int = 0
    """Rows where the last label taken and the first one left out are equally similar."""
    ties_in_order: int = 0
    """Rows where two labels taken are equally similar."""
    duplicate_classes: dict[str, int] = field(default_factory=dict)
    """Names that occur more than once in the class list, with how often."""
    duplicate_rows: int = 0
    """Rows whose right label is such a name."""
    dropped: dict[str, int] = field(default_factory=dict)


def check_k(k: int, labels: int, where: str = "") -> None:
    """UserError where no question can have k options. where: what has these labels."""
    if not 2 <= k <= len(LETTERS):
        raise UserError(f"k = {k}", why=f"a multiple-choice question has 2 to {len(LETTERS)} options")
    if k > labels:
        why, hint = "every option is another label", f"at most {labels}: --set mining.k={labels} of a study, --k {labels} of a command"
        raise UserError(f"k = {k} options from {labels} distinct labels", why=why, hint=hint, where=where)


def distinct_labels(classes: Sequence[str]) -> int:
    """How many labels class names are."""
    return len({same_name(name) for name in classes})


def same_name(name: str) -> str:
    """Names equal under this are one label: case and white space don't make another answer (answers are matched in lower case)."""
    return " ".join(name.split()).casefold()


def merge_duplicates(classes: Sequence[str]) -> tuple[np.ndarray, dict[str, int]]:
    """int64[C]: each class's first namesake; and the names that occur more than once (CLIP's ImageNet list has two)."""
    first: dict[str, int] = {}
    owner = np.array([first.setdefault(same_name(name), index) for index, name in enumerate(classes)], dtype=np.int64)
    return owner, {classes[index]: int(n) for index, n in Counter(owner.tolist()).items() if n > 1}


def truth_of(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """int64[N]: the class number of each row's label. UserError for a label that isn't a class."""
    number = {name: index for index, name in reversed(list(enumerate(classes)))}
    unknown = Counter(label for label in labels if label not in number)
    if unknown:
        name, count = unknown.most_common(1)[0]
        raise UserError(
            f"{sum(unknown.values())} rows have a label that isn't among the {len(classes)} classes, {name!r} {count} times",
            hint=nearest(name, classes),
        )
    return np.array([number[label] for label in labels], dtype=np.int64)


def hardest(similarities: np.ndarray, truth: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k - 1 most similar labels other than the truth, of float[N, C] similarities between rows and *distinct* labels.

    Returns (negatives int64[N, k - 1] in ascending similarity, tie at the cut bool[N], tie in the order bool[N]).
    """
    rows, labels = similarities.shape
    check_k(k, labels)
    chosen = np.empty((rows, k - 1), dtype=np.int64)
    at_the_cut, in_order = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=bool)
    for start in range(0, rows, CHUNK):
        block = np.array(similarities[start : start + CHUNK], dtype=np.float64)
        if np.isnan(block).any():
            row = start + int(np.argmax(np.isnan(block).any(axis=1)))
            raise UserError(f"the similarities of row {row} hold NaN", why="they can't be ordered")
        at = np.arange(len(block))
        block[at, truth[start : start + CHUNK]] = -np.inf
        ranked = np.argsort(block, axis=1, kind="stable")[:, : -k - 1 : -1]
        values = np.take_along_axis(block, ranked, axis=1)
        stop = start + len(block)
        chosen[start:stop] = ranked[:, k - 2 :: -1]
        # the k-th column is the truth itself (minus infinity) where there are just k labels: never a tie
        at_the_cut[start:stop] = (values[:, k - 2] == values[:, k - 1]) & (values[:, k - 1] > -np.inf)
        in_order[start:stop] = (values[:, : k - 2] == values[:, 1 : k - 1]).any(axis=1)
    return chosen, at_the_cut, in_order


def from_similarities(similarities: np.ndarray, classes: Sequence[str], labels: Sequence[str], k: int) -> Negatives:
    """Hard negatives for N rows from float[N, C] similarities to C class names (repeats allowed) and N labels."""
    if similarities.shape != (len(labels), len(classes)):
        raise UserError(
            f"similarities of shape {list(similarities.shape)} for {len(labels)} rows and {len(classes)} classes",
            why="there is one row per image and one column per class",
        )
    owner, duplicates = merge_duplicates(classes)
    columns = np.unique(owner)
    truth = owner[truth_of(labels, classes)]
    distinct = similarities if len(columns) == len(classes) else similarities[:, columns]
    chosen, at_the_cut, in_order = hardest(distinct, np.searchsorted(columns, truth), k)
    names = np.array([classes[c] for c in columns], dtype=object)
    wrong = names[chosen].tolist()
    doubled = {int(owner[classes.index(name)]) for name in duplicates}
    return Negatives(
        options=[[label, *row] for label, row in zip(labels, wrong)],
        kept=np.arange(len(labels)),
        ties_at_the_cut=int(at_the_cut.sum()),
        ties_in_order=int(in_order.sum()),
        duplicate_classes=duplicates,
        duplicate_rows=sum(int(t) in doubled for t in truth) if doubled else 0,
    )


def from_annotations(labels: Sequence[str], wrong: Sequence[Mapping[str, int]], k: int) -> Negatives:
    """Negatives that people marked as wrong predictions of models: a row's k - 1 most often marked labels.

    wrong: for each row {label: how often}. Rows with fewer than k - 1 other labels are dropped and counted. Equal counts are ordered
    by name, counted as ties. The filter is ours: the paper narrows 19,056 annotated images to 5,457 without saying how.
    """
    check_k(k, len(LETTERS))
    options: list[list[str]] = []
    kept: list[int] = []
    at_the_cut = in_order = short = 0
    for index, (label, marks) in enumerate(zip(labels, wrong)):
        merged: dict[str, tuple[str, int]] = {}
        for name, count in marks.items():
            key = same_name(name)
            if key != same_name(label):
                merged[key] = (merged[key][0] if key in merged else name, count + (merged[key][1] if key in merged else 0))
        ranked = sorted(merged.values(), key=lambda item: (-item[1], item[0]))
        if len(ranked) < k - 1:
            short += 1
            continue
        taken = ranked[: k - 1]
        at_the_cut += len(ranked) >= k and ranked[k - 1][1] == taken[-1][1]
        in_order += any(a[1] == b[1] for a, b in zip(taken, taken[1:]))
        options.append([label, *(name for name, _ in reversed(taken))])
        kept.append(index)
    return Negatives(
        options=options,
        kept=np.array(kept, dtype=np.int64),
        ties_at_the_cut=int(at_the_cut),
        ties_in_order=int(in_order),
        dropped={f"fewer than {k - 1} wrong labels": short} if short else {},
    )
