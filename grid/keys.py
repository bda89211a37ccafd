"""Every key of study and profile files, with its meaning, unit and default: printed from the code that reads them.

python -m grid.keys [NAME ...]        all of them, or those of the named parts (Study, Training, Benchmark, Profile, Data, ...)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from datasets_ray.errors import UserError, nearest
from datasets_ray.schema import REQUIRED, explain
from grid import options, profile, recipe, study
from grid.plantext import flow
from trainers import switches

PARTS: dict[str, Any] = {
    kind.__name__: kind
    for module in (study, recipe, profile)
    for kind in vars(module).values()
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind is not profile.Asset and kind.__module__ == module.__name__
}


def told(name: str) -> str:
    """One part's keys as text."""
    kind = PARTS[name]
    lines = [f"{name}: {' '.join((kind.__doc__ or '').split())}"]
    for field, (key, meaning) in zip(dataclasses.fields(kind), explain(kind), strict=True):
        annotation = str(field.type).replace("Node", "value")
        default = "required" if field.default is REQUIRED and field.default_factory is REQUIRED else f"default {default_of(field)}"
        lines.append(f"  {key}: {meaning} ({annotation}; {default})")
        if (name, field.name) == ("Resources", "disable"):
            lines += [f"    {switch}: {does}" for switch, does in switches.SWITCHES.items()]
    return "\n".join(lines)


def default_of(field: dataclasses.Field) -> str:
    """A field's default as one would write it."""
    value = field.default_factory() if field.default_factory is not REQUIRED else field.default
    if dataclasses.is_dataclass(value):
        return f"see {type(value).__name__}"
    return flow(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser("grid.keys", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts to explain; default: all")
    names = parser.parse_args(argv).names or list(PARTS)
    for name in names:
        if name not in PARTS:
            raise UserError(f"no part {name!r}", hint=nearest(name, PARTS))
    print("\n\n".join(told(name) for name in names))
    return 0


if __name__ == "__main__":
    options.run(main)
