"""Arms from their entries: products, zips, seeds and single points in; named arms with a typed recipe each out, in stable order.

An arm is its diff from `base`: axis values (each may set several recipe keys) and then its own `set`. Sections of a recipe
are typed once per distinct set of changes, so that thousands of arms cost little.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, replace
from typing import Any

from datasets_ray.errors import nearest
from datasets_ray.schema import Reader, _fields
from datasets_ray.yamlfile import Node, merged, nested
from grid.recipe import Recipe, Training, _name
from grid.study import ArmEntry, Reference, Study

FIELD = re.compile(r"\{[^{}]*\}|[{}]")
"""A place in the template of a name, or a brace without its other half."""


@dataclass
class Arm:
    """One configuration of the grid."""

    name: str
    row: int | None
    source: str
    """`trained`, or `released`: evaluated only."""
    axes: dict[str, str]
    recipe: Recipe
    where: str
    released: str | None = None
    changes: dict[str, Any] | None = None
    """Recipe keys set beyond the axes."""
    stands_in: bool = False
    """A reference that the profile trains itself, for want of the released weights."""
    content: Any = None
    """What its recipe says, seed and all: equal for arms that train the same."""


def expand(study: Study, recipe: Node, reader: Reader) -> list[Arm]:
    """All arms, trained ones first. Mistakes go to `reader`; arms with mistakes are left out."""
    maker = Maker(study, recipe, reader)
    arms: list[Arm] = []
    for index, entry in enumerate(study.arms):
        where = reader.marks[f"arms[{index}]"]
        points = list(_points(entry))
        if len(points) == 0:
            reader.error(f"arms[{index}] makes no arm", why="a product or zip over an empty list", where=where)
        for point, seed in points:
            axes = {**study.base, **entry.at, **point}
            changes = dict(entry.set)
            if seed is not None:
                changes["seed"] = Node(seed, *_place(where))
            built = maker.recipe(axes, changes)
            name = _named(entry, axes, point, seed, reader, where)
            if built is not None and name is not None:
                plain = {path: node.plain() for path, node in changes.items()}
                arms.append(Arm(name, entry.row, "trained", axes, built, where, changes=plain, content=maker.content(built)))
    for index, reference in enumerate(study.references):
        where = reader.marks[f"references[{index}]"]
        built = maker.recipe(axes := {**study.base, **reference.at}, {})
        if built is not None:
            of = reference.released
            arms.append(Arm(reference.name, reference.row, "released", axes, built, where, of, {}, content=(of, maker.content(built))))
    _no_twins(arms, reader)
    used = {pair for at in (study.base, *(entry.at for entry in study.arms), *(one.at for one in study.references)) for pair in at.items()}
    forms = [item for entry in study.arms for item in (*entry.product.items(), *entry.zip.items())]
    used |= {(axis, value) for axis, values in forms for value in values}
    for pair in maker.effects.keys() - used:
        maker.look_at(pair)
    return arms


def _points(entry: ArmEntry) -> Iterator[tuple[dict[str, str], int | None]]:
    """(axis values, seed) of an entry: zip rows × product × seeds, the last varying fastest."""
    zipped = [dict(zip(entry.zip, row)) for row in zip(*entry.zip.values())] if entry.zip else [{}]
    crossed = [dict(zip(entry.product, row)) for row in itertools.product(*entry.product.values())]
    seeds: list[int | None] = [*entry.seeds] or [None]
    for row, combination, seed in itertools.product(zipped, crossed, seeds):
        yield {**row, **combination}, seed


def _named(entry: ArmEntry, axes: dict[str, str], point: dict[str, str], seed: int | None, reader: Reader, where: str) -> str | None:
    """The arm's name by its template, else from what varies."""
    if entry.name is None:
        varying = point or entry.at
        name = "-".join(varying.values()) or "base"
    else:
        given = {**axes, **({} if seed is None else {"seed": str(seed)}), **({} if entry.row is None else {"row": str(entry.row)})}
        wrong = next((field for field in FIELD.findall(entry.name) if field[1:-1] not in given), None)
        if wrong is not None:
            why = "{...} stands for an axis, for `row`, or for one of `seeds`, where the entry has them"
            reader.error(f"name {entry.name!r} can't be filled: {wrong}", why=why, hint=nearest(wrong.strip("{}"), given), where=where)
            return None
        name = FIELD.sub(lambda field: given[field[0][1:-1]], entry.name)
    if seed is not None and "{seed" not in (entry.name or ""):
        name = f"{name}-s{seed}"
    if wrong := _name(name):
        reader.error(f"name {wrong}", why="files and metrics are named by it", where=where)
        return None
    return name


def _no_twins(arms: list[Arm], reader: Reader) -> None:
    """Two arms with one name, one published row or one content are a mistake; both places are told."""
    names: dict[str, Arm] = {}
    rows: dict[int, Arm] = {}
    contents: dict[Any, Arm] = {}
    for arm in arms:
        content = (arm.released, tuple(arm.axes.values()), repr(sorted((arm.changes or {}).items())))
        if (twin := names.setdefault(arm.name, arm)) is not arm:
            reader.error(f"arm {arm.name!r} defined twice", why=f"also at {twin.where}", hint="names are unique", where=arm.where)
        elif (twin := contents.setdefault(content, arm)) is not arm:
            hint = "let them differ in an axis, `set` or `seeds`"
            reader.error(
                f"arms {twin.name!r} and {arm.name!r} are the same",
                why=f"same axes and settings as at {twin.where}",
                hint=hint,
                where=arm.where,
            )
        if arm.row is not None and (twin := rows.setdefault(arm.row, arm)) is not arm:
            reader.error(f"row {arm.row} is claimed by {twin.name!r} and {arm.name!r}", why=f"first at {twin.where}", where=arm.where)


def _place(where: str) -> tuple[str, int | None]:
    file, _, line = where.rpartition(":")
    return (file, int(line)) if line.isdigit() else (where, None)


class Maker:
    """Types recipes: the base tree, changed by axis values and sets."""

    def __init__(self, study: Study, tree: Node, reader: Reader) -> None:
        self.study, self.tree, self.reader = study, tree, reader
        self.cache: dict[Any, Any] = {}
        self.kept: list[Any] = []
        self.told: set[str] = set()
        self.texts: dict[int, str] = {}
        """Identity of a section → what it says."""
        self.compared: set[Any] = set()
        self.effects = {(axis, value): self._effects(axis, value) for axis, values in study.axes.items() for value in values}

    def _effects(self, axis: str, value: str) -> dict[str, Node]:
        values = self.study.axes[axis]
        if isinstance(values, list):
            return {axis: Node(value, *_place(self.reader.marks[f"axes.{axis}"]))}
        return values[value]

    def recipe(self, axes: dict[str, str], changes: dict[str, Node]) -> Recipe | None:
        """The typed recipe, or None after telling what is wrong."""
        touched: dict[str, list[tuple[str, Node]]] = {}
        points = list(axes.items())
        for index, point in enumerate(points):
            for other in points[: index + 1]:
                self._compare(other, point)
            for path, node in self.effects[point].items():
                touched.setdefault(path.split(".")[0], []).append((path, node))
        for path, node in changes.items():
            touched.setdefault(path.split(".")[0], []).append((path, node))
        values: dict[str, Any] = {}
        for name in _fields(Recipe):
            section = self._section(name, touched.pop(name, []))
            if section is None:
                return None
            values[name] = section[0]
        for edits in touched.values():
            for path, node in edits:
                self._tell(f"{path}: no key of the recipe", hint=nearest(path, _paths()), where=node.where)
        return None if touched else Recipe(**values)

    def content(self, recipe: Recipe) -> Any:
        """What the recipe says, as something to compare and to hash."""
        values = {name: getattr(recipe, name) for name in _fields(Recipe)}
        values["seed"] = self.study.seed if recipe.seed is None else recipe.seed
        return tuple(self.texts.get(id(value)) or repr(value) for value in values.values())

    def _compare(self, one: tuple[str, str], two: tuple[str, str]) -> None:
        """Tells where two axis values (or two keys of one) set the same recipe key to different values: the later would undo the other."""
        if (one, two) in self.compared:
            return
        self.compared.add((one, two))
        for index, (first, a) in enumerate(self._leaves(one)):
            for second, b in self._leaves(two)[index + 1 if one == two else 0 :]:
                apart = not f"{first}.".startswith(f"{second}.") and not f"{second}.".startswith(f"{first}.")
                if apart or (first == second and a.plain() == b.plain()):
                    continue
                said = f"{first} is set by axis {one[0]!r} and by" if first == second else f"{first} is set by axis {one[0]!r}, {second} by"
                self._tell(f"{said} axis {two[0]!r}", why=f"to different values, the other at {a.where}", where=b.where)

    def _leaves(self, point: tuple[str, str]) -> list[tuple[str, Node]]:
        """(dotted key, node) of all that an axis value sets, mappings opened."""
        found, waiting = [], list(self.effects[point].items())
        while waiting:
            path, node = waiting.pop(0)
            if isinstance(node.value, dict):
                waiting += [(f"{path}.{key}", child) for key, child in node.value.items()]
            else:
                found.append((path, node))
        return found

    def _section(self, name: str, edits: list[tuple[str, Node]]) -> tuple[Any] | None:
        """One field of the recipe with its edits, typed; in a tuple, since the value itself may be None."""
        cached = self.cache.get(marker := (name, tuple((path, id(node)) for path, node in edits)), ())
        if cached != ():
            return cached
        result: tuple[Any] | None
        field = _fields(Recipe)[name][1]
        if name not in self.tree.value and not edits:
            result = (field.default_factory() if field.default_factory is not MISSING else field.default,)
        else:
            value, reader = self._typed(name, edits)
            for error in reader.errors:
                if error.render() not in self.told:
                    self.told.add(error.render())
                    self.reader.errors.append(error)
            result = None if reader.errors else (value,)
            self.reader.sections[id(value)] = value, reader.marks
            self.texts[id(value)] = repr(value)
        self.cache[marker] = result
        self.kept.append(edits)  # so that the ids in the cache's keys stay taken
        return result

    def look_at(self, point: tuple[str, str]) -> None:
        """Tells mistakes of an axis value that no arm has, as far as it can be typed without the values of other axes."""
        for path, node in self.effects[point].items():
            name = path.split(".")[0]
            if name not in _fields(Recipe):
                self._tell(f"{path}: no key of the recipe", hint=nearest(path, _paths()), where=node.where)
                continue
            wrong = [error for error in self._typed(name, [(path, node)])[1].errors if not error.what.endswith(": missing")]
            self.reader.errors += [error for error in wrong if error.render() not in self.told]
            self.told |= {error.render() for error in wrong}

    def _typed(self, name: str, edits: list[tuple[str, Node]]) -> tuple[Any, Reader]:
        """(the value of a field of the recipe with its edits, who read it)."""
        partial = Node({name: self.tree.value[name]} if name in self.tree.value else {}, self.tree.file, self.tree.line)
        for path, node in edits:
            partial = merged(partial, nested(path.split("."), node))
        annotation, field = _fields(Recipe)[name]
        reader = Reader()
        return reader._value(annotation, partial.value[name], f"recipe.{name}", field.metadata), reader

    def _tell(self, what: str, *, why: str = "", hint: str = "", where: str) -> None:
        if what + where not in self.told:
            self.told.add(what + where)
            self.reader.error(what, why=why, hint=hint, where=where)


def _paths() -> list[str]:
    """Every dotted key of a recipe."""
    inner = [f"{section}.{name}" for section in ("pretrain", "finetune") for name in _fields(Training)]
    return [*_fields(Recipe), *inner, "connector.builder", "connector.depth"]


def with_changes(arm: Arm, study: Study, tree: Node, changes: dict[str, Node], reader: Reader) -> Arm:
    """The arm with more recipe keys set: how a stand-in of a released model is made."""
    built = Maker(study, tree, reader).recipe(arm.axes, changes)
    return replace(arm, recipe=built or arm.recipe, stands_in=True)


__all__ = ["Arm", "Maker", "Reference", "expand", "with_changes"]
