"""The `where` of a contrast: which arms it speaks of. Text in, clauses out; one reading for checks and effects.

Clauses are joined by `;`, each is `key=value`, `key=a|b` or `key!=value`: `arch=llava;updating=connector;row!=2`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from datasets_ray.errors import UserError, nearest

FACTS = ("row", "source", "init", "name")
"""What a clause may name besides the axes."""


@dataclass(frozen=True)
class Clause:
    key: str
    values: tuple[str, ...]
    negated: bool

    def holds(self, facts: Mapping[str, str]) -> bool:
        return (facts[self.key] in self.values) != self.negated


def parse_where(text: str, keys: Iterable[str], at: str = "") -> tuple[Clause, ...]:
    """The clauses of a `where`; keys are the axes. Raises UserError naming the clause that is wrong."""
    keys = list(keys)
    known, clauses = [*keys, *FACTS], []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        negated = "!=" in part
        key, sign, value = (s.strip() for s in part.partition("!=" if negated else "="))
        values = tuple(v.strip() for v in value.split("|"))
        if not sign or not key or not all(values) or "=" in value:
            raise UserError(
                f"cannot read the clause {part!r} of where {text!r}",
                why="a clause is key=value, key=a|b or key!=value",
                hint="join clauses by ';', for example arch=llava;row!=2",
                where=at,
            )
        if key not in known:
            raise UserError(f"where names {key!r}", why="neither an axis nor row, source, init, name", hint=nearest(key, known), where=at)
        if key == "row" and key not in keys and not all(value.isdecimal() for value in values):
            raise UserError(f"cannot read the clause {part!r} of where {text!r}", why="a row is a number", hint="row!=2", where=at)
        clauses.append(Clause(key, values, negated))
    return tuple(clauses)
