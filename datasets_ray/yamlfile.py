"""YAML with the file and line of every value: text in, a tree of `Node`s out. Nothing is constructed from tags (safe by design).

Scalars follow YAML 1.2's core rules (`1e-3` is a number, `no` and `on` are words), so that a study reads as it is written.
Duplicate keys, merge keys and tags are errors with their line.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, ScalarNode, SequenceNode

from datasets_ray.errors import UserError, UserErrors, nearest

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
INT = re.compile(r"[-+]?[0-9][0-9_]*$")
TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "value", "merge")
)
DIGITS = 300
"""A longer number is read as a float, which may then be infinite: Python refuses to read thousands of digits."""
MOST = 500_000
"""Values of a file, those of its aliases counted wherever they stand."""
DEEP = 100
"""Levels of a file: what is nested deeper is no study."""
BRACKET = re.compile(rf"[\[\]{{}}]|(?:[-?:] +){{{10 * DEEP}}}")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$")
WORDS: dict[str, Any] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None, "true": True, "True": True, "TRUE": True,
    "false": False, "False": False, "FALSE": False,
    ".inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan"),
}  # fmt: skip


class Node:
    """A value and where it stands. `value`: a scalar, `list[Node]` or `dict[str, Node]`; `line`: 1-based, of the key in mappings."""

    __slots__ = ("value", "file", "line")

    def __init__(self, value: Any, file: str, line: int | None) -> None:
        self.value, self.file, self.line = value, file, line

    @property
    def where(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def plain(self) -> Any:
        """The tree as ordinary Python values."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def __repr__(self) -> str:
        return f"Node({self.plain()!r} at {self.where})"


def scalar(text: str) -> Any:
    """What a plain (unquoted) scalar means."""
    if text in WORDS:
        return WORDS[text]
    if INT.match(text) and len(text) <= DIGITS:
        return int(text.replace("_", ""))
    if FLOAT.match(text):
        return float(text.replace("_", ""))
    return text


def _convert(node: Any, file: str, line: int, errors: list[UserError], open_: set[int], count: Iterator[int]) -> Node:
    """open_: what it stands in; count: of the values so far, aliases written out."""
    number = next(count)
    if number >= MOST:
        if number == MOST:
            errors.append(UserError(f"more than {MOST:,} values", why="do aliases of aliases multiply?", where=f"{file}:{line}"))
        return Node(None, file, line)
    if id(node) in open_:
        errors.append(UserError("an anchor that contains itself", why="a study is a tree", where=f"{file}:{line}"))
        return Node(None, file, line)
    tag = node.tag or ""
    if tag not in TAGS:
        errors.append(
            UserError(
                f"tag {tag!r}", why="tags are not read: a study holds plain values only", hint="remove the tag", where=f"{file}:{line}"
            )
        )
        return Node(None, file, line)
    if isinstance(node, ScalarNode):
        return Node(scalar(node.value) if not node.style else node.value, file, line)
    open_ = open_ | {id(node)}
    if len(open_) > DEEP:
        errors.append(UserError(f"more than {DEEP} levels", why="a study is not so deep", where=f"{file}:{line}"))
        return Node(None, file, line)
    if isinstance(node, SequenceNode):
        return Node([_convert(item, file, item.start_mark.line + 1, errors, open_, count) for item in node.value], file, line)
    assert isinstance(node, MappingNode)
    found: dict[str, Node] = {}
    for key_node, value_node in node.value:
        at = key_node.start_mark.line + 1
        if not isinstance(key_node, ScalarNode):
            errors.append(UserError("a key that is a list or a mapping", why="keys are words", where=f"{file}:{at}"))
            continue
        key = str(key_node.value)
        if key == "<<":
            errors.append(UserError("merge key '<<'", why="an arm is its diff from `base`; nothing else merges", where=f"{file}:{at}"))
        elif key in found:
            errors.append(
                UserError(
                    f"key {key!r} twice",
                    why=f"it stands already in line {found[key].line}",
                    hint="keep one of the two",
                    where=f"{file}:{at}",
                )
            )
        else:
            found[key] = _convert(value_node, file, at, errors, open_, count)
    return Node(found, file, line)


def parse(text: str, file: str, *, lines: bool = True) -> Node:
    """Text → tree. `lines=False` for values that stand on the command line: places are then the `file` alone."""
    _not_too_deep(text, file, lines)
    try:
        composed = yaml.compose(text, Loader=LOADER)
    except yaml.reader.ReaderError as error:
        line = text[: max(0, text.find(chr(error.character) if isinstance(error.character, int) else str(error.character)))].count("\n") + 1
        why = f"character {error.character!r}: {error.reason}"
        raise UserError("not text", why=why, hint="save it as plain UTF-8", where=f"{file}:{line}" if lines else file) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark and lines else file
        problem = getattr(error, "problem", None) or str(error)
        hint = "indent with spaces and quote text that holds ': ' or '#'"
        raise UserError(f"not YAML: {problem}", why=getattr(error, "context", None) or "", hint=hint, where=where) from None
    if composed is None:
        return Node(None, file, 1 if lines else None)
    errors: list[UserError] = []
    tree = _convert(composed, file, composed.start_mark.line + 1, errors, set(), itertools.count())
    if errors:
        raise UserErrors(errors)
    if not lines:
        _forget_lines(tree)
    return tree


def _not_too_deep(text: str, file: str, lines: bool) -> None:
    """The library reads what is nested by calling itself, and dies of ten thousands of levels: by brackets, or by dashes in a line."""
    depth = 0
    for found in BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > 10 * DEEP or len(found[0]) > 1:
            where = f"{file}:{text.count(chr(10), 0, found.start()) + 1}" if lines else file
            raise UserError(f"more than {DEEP} levels", why="a study is not so deep", where=where)


def _forget_lines(tree: Node) -> None:
    tree.line = None
    for child in tree.value.values() if isinstance(tree.value, dict) else tree.value if isinstance(tree.value, list) else ():
        _forget_lines(child)


def shown(path: Path) -> str:
    """A path as the person would type it: relative to the working directory where that is shorter."""
    try:
        relative = str(path.resolve().relative_to(Path.cwd().resolve()))
    except (ValueError, OSError, RuntimeError):  # elsewhere, or no path at all: links in a circle
        return str(path)
    return relative


def is_file(path: Path) -> bool:
    """Whether there is such a file; no name that a file system refuses (too long) is one."""
    try:
        return path.is_file()
    except OSError:
        return False


def read(path: Path) -> Node:
    """The tree of a file; UserError where it is missing, unreadable or no mapping."""
    name = shown(path)
    if not is_file(path):
        beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"no file {name}", hint=nearest(path.name, beside) if beside else "give the path of a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        at = f"{name}:{error.object[: error.start].count(10) + 1}"
        raise UserError(f"{name} is not text", why=f"byte {error.start} is not UTF-8", hint="save it as UTF-8", where=at) from None
    except OSError as error:
        raise UserError(f"{name} can't be read", why=error.strerror or str(error), where=name) from None
    tree = parse(text, name)
    if not isinstance(tree.value, dict):
        raise UserError(
            f"{name} holds no keys", why="it is a mapping of keys to values", hint="write `key: value` lines", where=f"{name}:1"
        )
    return tree


def merged(below: Node | None, above: Node) -> Node:
    """Two trees as one: mappings join key by key, anything else of `above` replaces. Neither is changed."""
    if below is None or not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    joined = dict(below.value)
    for key, node in above.value.items():
        joined[key] = merged(joined.get(key), node)
    return Node(joined, above.file, above.line)


def nested(path: list[str], leaf: Node) -> Node:
    """`["a", "b"]` and a leaf → `{a: {b: leaf}}`, all at the leaf's place."""
    for key in reversed(path):
        leaf = Node({key: leaf}, leaf.file, leaf.line)
    return leaf
