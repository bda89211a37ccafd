"""What an objective's constructor takes, read from its source: importing it would load torch.

In: `NAME` of trainers/objectives or `module:Class`. Out: its keys with their types, or None where only running the code would tell: a
module that isn't on the path here, a class that inherits its constructor, `**keys`.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError, nearest
from datasets_ray.schema import ROOT, SAID, registered_values

TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
PLAIN_BASES = {"Protocol", "Objective", "object"}
"""Bases that bring no constructor."""


@dataclass(frozen=True)
class Keys:
    """name → annotated type, None for any other; and those without a default."""

    types: Mapping[str, type | None]
    required: tuple[str, ...]


def mistakes(objective: Mapping[str, Any]) -> list[UserError]:
    """What is wrong with the keys of `{"name": ..., ...}`; `where` is the key at fault, empty for the whole. Raises UserError for a class
    that its module doesn't have."""
    name = str(objective["name"])
    known = keys_of(name)
    if known is None:
        return []
    found = []
    takes = f"it takes {', '.join(known.types)}" if known.types else "it takes none"
    for key, value in objective.items():
        if key == "name":
            continue
        kind = known.types.get(key)
        if key not in known.types:
            hint = nearest(key, known.types) if known.types else f"objective: {{name: {name}}}"
            found.append(UserError(f"objective {name!r} has no key {key!r}", why=takes, hint=hint, where=key))
        elif kind is not None and not _is(value, kind):
            found.append(UserError(f"{key} of objective {name!r} is {value!r}", why=f"{SAID[kind]} is expected", where=key))
    missing = [key for key in known.required if key not in objective]
    if missing:
        found.append(UserError(f"objective {name!r} without {' and '.join(missing)}", why=takes, hint=f"add `{missing[0]}: ...`"))
    return found


@functools.cache
def keys_of(name: str) -> Keys | None:
    """Of a registered objective, or of `module:Class`."""
    target = registered_values("trainers/objectives/__init__.py", "OBJECTIVES").get(name, name)
    module, _, made = target.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), made]):
        raise UserError(f"objective {name!r} is no `module:Class`", why="a dotted module, a colon, a class", hint="my.losses:Ranking")
    file = _file(module)
    if file is None:
        return None
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"objective {name!r} can't be read", why=f"{file}: {error}") from None
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if made not in classes:
        if any(_binds(node, made) for node in tree.body):
            return None
        raise UserError(f"objective {name!r}: {module} has no class {made!r}", why=str(file), hint=nearest(made, classes))
    return _constructor(classes[made])


def _file(module: str) -> Path | None:
    """The source of a module, found without importing its package."""
    inner = Path(*module.split("."))
    for folder in (ROOT, *(Path(entry or ".") for entry in sys.path)):
        for file in (folder / inner.with_suffix(".py"), folder / inner / "__init__.py"):
            if file.is_file():
                return file
    return None


def _binds(node: ast.AST, name: str) -> bool:
    """Whether a statement may give a module this name in another way than by a class of its own."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.alias) and (inner.asname or inner.name) in (name, "*"):
            return True
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and inner.name == name:
            return True
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store) and inner.id == name:
            return True
    return False


def _constructor(made: ast.ClassDef) -> Keys | None:
    init = next((node for node in made.body if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__new__")), None)
    if init is None:
        inherits = any(not isinstance(base, ast.Name) or base.id not in PLAIN_BASES for base in made.bases)
        return None if inherits or made.keywords or made.decorator_list else Keys({}, ())
    given = init.args
    if made.decorator_list or init.decorator_list or given.kwarg is not None or given.vararg is not None or init.name == "__new__":
        return None
    plain = [*given.posonlyargs, *given.args][1:]
    without = plain[: len(plain) - len(given.defaults)] if given.defaults else plain
    bare = [arg for arg, default in zip(given.kwonlyargs, given.kw_defaults) if default is None]
    types = {arg.arg: TYPES.get(getattr(arg.annotation, "id", "")) for arg in [*plain, *given.kwonlyargs]}
    return Keys(types, tuple(arg.arg for arg in [*without, *bare]))


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
