"""What every source is held to after its rows are made: the release's count, and how much of it may be lost.

In: a stage's spec and the manifest of its rows. Out: the manifest, with `records` and where allowed `subset`, or a UserError with the
counts, the reasons, examples and the way out. Common keys, taken out of the spec before the source's reader sees it:

    expect        how many records the release has; more or fewer is an error
    allow_subset  fewer, and images that aren't there, are fine: the manifest's `subset` says {"expected", "found"}
    most_dropped  the largest share of records that may be dropped (0.05: one in twenty)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError, UserErrors

MISSING = "image missing"
"""Reasons that begin so are no fault of the file: with `allow_subset` they don't count."""
MOST_DROPPED = 0.01
"""Share of a published data set's records that may be dropped where nobody says."""
EXAMPLES = 5
LEAST = 100
WAYS = {
    "image missing": "put the images where the list says (key `images`, or the downloader's --again)",
    "image outside its root": "give the folder that really holds the images; links out of it aren't followed",
    "image is a git-LFS pointer": "git lfs pull",
    "image is a git-annex pointer": "git annex get",
}
"""Reason → the way out, for what a user can mend."""


@dataclass(frozen=True)
class Policy:
    """The common keys of a spec."""

    source: str
    expect: int | None = None
    allow_subset: bool = False
    most_dropped: float | None = None

    @classmethod
    def split(cls, spec: Mapping[str, Any]) -> tuple[Policy, dict[str, Any]]:
        """The policy and the source's own spec. UserErrors for values that mean nothing."""
        given = {key: spec[key] for key in KEYS if spec.get(key) is not None}
        errors = []
        expect, most, subset = given.get("expect"), given.get("most_dropped"), given.get("allow_subset", False)
        if expect is not None and (not isinstance(expect, int) or isinstance(expect, bool) or expect < 1):
            errors.append(UserError(f"expect: {expect!r}", why="the number of records in the release", hint="expect: 558128"))
        if most is not None and (not isinstance(most, int | float) or isinstance(most, bool) or not 0 <= most <= 1):
            errors.append(UserError(f"most_dropped: {most!r}", why="a share between 0 and 1", hint="most_dropped: 0.05"))
        if not isinstance(subset, bool):
            errors.append(UserError(f"allow_subset: {subset!r}", why="true or false"))
        if errors:
            raise UserErrors(errors)
        return cls(str(spec["source"]), **given), {key: value for key, value in spec.items() if key not in KEYS}

    def hold(self, manifest: dict[str, Any], out: Path, limit: int | None = None) -> dict[str, Any]:
        """The manifest, completed here and in `out`. Raises UserError, or UserErrors for several.

        limit: the spec's `rows`. With it `expect` isn't held, and below `LEAST` rows `most_dropped` isn't: a first row says nothing.
        """
        seen = manifest["rows"] + sum(manifest["dropped"].values())
        missing = sum(count for reason, count in manifest["dropped"].items() if reason.startswith(MISSING))
        lost = self._lost(manifest, seen, missing) if limit is None or limit >= LEAST else None
        counted = self._counted(manifest.setdefault("records", seen)) if limit is None else None
        errors = [error for error in (counted, lost) if error is not None]
        if errors:
            raise errors[0] if len(errors) == 1 else UserErrors(errors)
        if limit is not None:
            return manifest
        found = manifest["records"] - missing
        if self.allow_subset and self.expect is not None and found != self.expect:
            manifest["subset"] = {"expected": self.expect, "found": found}
        (out / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
        return manifest

    def _counted(self, records: int) -> UserError | None:
        if self.expect is None or self.allow_subset or records == self.expect:
            return None
        return UserError(
            f"source {self.source!r} has {records:,} records, its release has {self.expect:,}",
            why="cut short" if records < self.expect else "more than the release: another one, or two of them together",
            hint="get the whole release, correct `expect`, or say `allow_subset: true` to train on this part, which every table then says",
        )

    def _lost(self, manifest: Mapping[str, Any], records: int, missing: int) -> UserError | None:
        """An error when too much was dropped, or nothing is left."""
        lost = sum(manifest["dropped"].values()) - (missing if self.allow_subset else 0)
        limit = 1.0 if self.most_dropped is None else self.most_dropped
        if lost <= limit * records and (manifest["rows"] or not records):
            return None
        share = f"{lost:,} of {records:,} records ({100 * lost / records:.1f} %)" if manifest["rows"] else f"all {records:,} records"
        allowed = f", {100 * limit:g} % may be (most_dropped)" if self.most_dropped is not None else ""
        counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(manifest["dropped"].items(), key=lambda item: -item[1]))
        hints = [way for reason, way in WAYS.items() if any(one.startswith(reason) for one in manifest["dropped"])]
        if manifest["rows"]:
            hints.append("raise `most_dropped`, or with images missing on purpose `allow_subset: true`")
        return UserError(
            f"source {self.source!r}: {share} can't be used{allowed}",
            why=f"{counts}; for example {_examples(manifest)}",
            hint="; ".join(hints) or "look at the examples", where=manifest.get("root") or "",
        )  # fmt: skip


KEYS = ("expect", "allow_subset", "most_dropped")


def _examples(manifest: Mapping[str, Any]) -> str:
    """Five dropped items, of different reasons where there are several."""
    named: dict[str, list[str]] = {}
    for entry in manifest.get("dropped_examples", []):
        named.setdefault(entry["reason"], []).append(f"{entry['item']} ({entry['reason']})")
    turns = [items[turn] for turn in range(EXAMPLES) for items in named.values() if turn < len(items)]
    return ", ".join(turns[:EXAMPLES])
