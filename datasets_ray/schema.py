"""Strict typed reading: a tree of `yamlfile.Node`s and a dataclass in, an instance out, every mistake collected with its line.

Fields are declared with `option(...)`: what it means, its unit and the values it may take stand in one place, which is also
what an error message quotes. Annotations used: str, int, float, bool, X | None, list[X], dict[str, X], Literal[...],
dataclasses, `Node` (kept as it is) and `Any` (plain values).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from datasets_ray.errors import UserError, nearest
from datasets_ray.yamlfile import Node

REQUIRED = dataclasses.MISSING
ROOT = Path(__file__).resolve().parent.parent
SAID = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def option(
    doc: str, default: Any = REQUIRED, *, unit: str = "", low: float | None = None, high: float | None = None,
    above: float | None = None, check: Callable[[Any], str | None] | None = None,
) -> Any:  # fmt: skip
    """A field of a study or profile. doc: what it means; unit: of the number; low/high: inclusive limits, above: exclusive;
    check: value → what is wrong with it, or None. Without a default the key is required; list and dict defaults are copied."""
    meta = {"doc": doc, "unit": unit, "low": low, "high": high, "above": above, "check": check}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=functools.partial(type(default), default), metadata=meta, kw_only=True)
    if default is REQUIRED:
        return dataclasses.field(metadata=meta, kw_only=True)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=meta, kw_only=True)
    return dataclasses.field(default=default, metadata=meta, kw_only=True)


class Reader:
    """Collects mistakes while reading. `marks`: dotted path of every value read → its `file:line`."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []
        self.marks: dict[str, str] = {}
        self.sections: dict[int, tuple[Any, dict[str, str]]] = {}
        """Identity of a value that was typed on its own (an arm's recipe section) → (the value, its marks)."""

    def marks_of(self, value: Any) -> dict[str, str]:
        """Where the keys of a section stand; the whole file's marks if it wasn't typed on its own."""
        return self.sections.get(id(value), (None, self.marks))[1]

    def error(self, what: str, *, why: str = "", hint: str = "", where: str = "", at: str | None = None) -> None:
        """One mistake. at: the dotted path of the value at fault; its place is looked up (a list item's without its own: its list's)."""
        while at is not None and not where and at:
            where, at = self.marks.get(at, ""), at.rpartition(".")[0]
        self.errors.append(UserError(what, why=why, hint=hint, where=where))

    def read(self, cls: type, node: Node, path: str = "") -> Any:
        """An instance of the dataclass, or None where a mistake makes one impossible (it is in `errors`)."""
        self.marks[path] = node.where
        if not isinstance(node.value, dict):
            why = f"a mapping with keys such as {', '.join(list(_fields(cls))[:3])} is expected"
            self.error(f"{path or 'the file'} is {_kind(node.value)}", why=why, where=node.where)
            return None
        fields = _fields(cls)
        values: dict[str, Any] = {}
        broken = False
        for name, child in node.value.items():
            here = f"{path}.{name}" if path else name
            if name not in fields:
                why = f"{path} has no such key" if path else "the file has no such key"
                self.error(f"{here}: unknown key", why=why, hint=nearest(name, fields), where=child.where)
                continue
            annotation, field = fields[name]
            before = len(self.errors)
            values[field.name] = self._value(annotation, child, here, field.metadata)
            broken |= len(self.errors) > before
        for name, (_, field) in fields.items():
            if field.name not in values and name not in node.value and field.default is REQUIRED and field.default_factory is REQUIRED:
                here = f"{path}.{name}" if path else name
                self.error(f"{here}: missing", why=field.metadata.get("doc", "it is required"), hint=f"add `{name}: ...`", where=node.where)
                broken = True
        return None if broken else cls(**values)

    def _value(self, annotation: Any, node: Node, path: str, meta: Any) -> Any:
        self.marks[path] = node.where
        count = len(self.errors)
        value = self._typed(annotation, node, path)
        if value is not None and not isinstance(value, Node) and count == len(self.errors):
            self._limits(value, path, node, meta)
        return value

    def _limits(self, value: Any, path: str, node: Node, meta: Any) -> None:
        unit = f" {meta.get('unit')}" if meta.get("unit") else ""
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            low, high, above = meta.get("low"), meta.get("high"), meta.get("above")
            limits = [("at least", low, low is None or number >= low), ("above", above, above is None or number > above)]
            limits += [("at most", high, high is None or number <= high)]
            if number != number or not all(kept for _, _, kept in limits):
                said = " and ".join(f"{word} {limit}" for word, limit, _ in limits if limit is not None) or "a number"
                self.error(f"{path}: {number} is impossible", why=meta.get("doc", ""), hint=f"{said}{unit}", where=node.where)
        if (check := meta.get("check")) and (wrong := check(value)):
            self.error(f"{path}: {wrong}", why=meta.get("doc", ""), where=node.where)

    def _typed(self, annotation: Any, node: Node, path: str) -> Any:
        origin, args = get_origin(annotation), get_args(annotation)
        value = node.value
        if annotation is Node:
            return node
        if annotation is Any:
            self._finite(node, path)
            return node.plain()
        if origin in (Union, types.UnionType):
            if value is None and type(None) in args:
                return None
            options = [a for a in args if a is not type(None)]
            return self._typed(next((a for a in options if _fits(a, value)), options[0]), node, path)
        if origin is Literal:
            if value not in args or isinstance(value, bool) != any(isinstance(a, bool) for a in args if a == value):
                said = node.plain()
                self.error(f"{path}: {said!r} is not a choice", hint=nearest(str(said), [str(a) for a in args]), where=node.where)
            return value
        if origin is list:
            if not isinstance(value, list):
                return self._wrong("a list", value, path, node)
            return [self._item(args[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
        if origin is dict:
            if not isinstance(value, dict):
                return self._wrong("a mapping", value, path, node)
            return {name: self._item(args[1], item, f"{path}.{name}") for name, item in value.items()}
        if dataclasses.is_dataclass(annotation):
            return self.read(typing.cast(type, annotation), node, path)
        if annotation is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, annotation) or (annotation is not bool and isinstance(value, bool)):
            return self._wrong(SAID[annotation], value, path, node)
        self._finite(node, path)
        return value

    def _finite(self, node: Node, path: str) -> None:
        """NaN and infinities are no numbers of a study, wherever they stand."""
        if isinstance(node.value, (dict, list)):
            items = node.value.items() if isinstance(node.value, dict) else enumerate(node.value)
            for name, child in items:
                self._finite(child, f"{path}.{name}" if isinstance(node.value, dict) else f"{path}[{name}]")
        elif isinstance(node.value, float) and not math.isfinite(node.value):
            self.error(f"{path}: {node.value} is impossible", why="a finite number is expected", where=node.where)

    def _item(self, annotation: Any, node: Node, path: str) -> Any:
        self.marks[path] = node.where
        return self._typed(annotation, node, path)

    def _wrong(self, expected: str, value: Any, path: str, node: Node) -> None:
        self.error(f"{path} is {_kind(value)}", why=f"{expected} is expected", where=node.where)


def _fits(annotation: Any, value: Any) -> bool:
    """Whether a value has the outer form of one option of a union."""
    origin = get_origin(annotation)
    if origin is Literal:
        return value in get_args(annotation)
    if origin is list:
        return isinstance(value, list)
    if origin is dict or dataclasses.is_dataclass(annotation):
        return isinstance(value, dict)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(annotation, type) and isinstance(value, annotation) and isinstance(value, bool) == (annotation is bool)


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    for kind, word in ((str, "text"), ((int, float), "the number"), (list, "a list"), (dict, "a mapping")):
        if isinstance(value, kind):
            return f"{word} {value!r}" if word in ("text", "the number") else word
    return repr(value)


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, dataclasses.Field]]:
    """Key → (resolved annotation, field) of a dataclass; `from_` is written `from`."""
    hints = typing.get_type_hints(cls)
    return {field.name.rstrip("_"): (hints[field.name], field) for field in dataclasses.fields(cls) if field.init}


def explain(cls: type) -> list[tuple[str, str]]:
    """(key, meaning with unit) of every field: documentation that can't fall behind the code."""
    told = ((name, field.metadata) for name, (_, field) in _fields(cls).items())
    return [(name, meta["doc"] + (f" [{meta['unit']}]" if meta["unit"] else "")) for name, meta in told]


@functools.cache
def registered_values(file: str, table: str) -> dict[str, Any]:
    """A module's literal table, read from its text: importing it would load torch or pyarrow. A value that isn't a constant is None."""
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(getattr(target, "id", "") == table for target in targets):
            assert isinstance(node.value, ast.Dict), f"{table} of {file} is a literal"  # type: ignore[attr-defined]
            pairs = zip(node.value.keys, node.value.values)  # type: ignore[attr-defined]
            return {str(key.value): getattr(value, "value", None) for key, value in pairs if isinstance(key, ast.Constant)}
    raise AssertionError(f"{file} has a table {table}")


def registered(file: str, table: str) -> tuple[str, ...]:
    """Keys of a module's literal table."""
    return tuple(registered_values(file, table))
