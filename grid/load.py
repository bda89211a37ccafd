"""A study file, a profile and `--set KEY=VALUE` in; both typed and checked out. Every mistake of all of them is told at once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets_ray import yamlfile
from datasets_ray.errors import UserError, UserErrors, nearest
from datasets_ray.schema import Reader, _fields
from datasets_ray.yamlfile import Node
from grid import benchmarks, compatibility, general_axis, normalisation, validate, validate_assets, validate_profile
from grid.doubts import doubts
from grid.expand import Arm, expand, with_changes
from grid.profile import HERE, Profile, choose, tree_of
from grid.study import Study


@dataclass
class Loaded:
    """What a command works with."""

    study: Study
    profile: Profile
    file: str
    """The study's path as typed."""
    directory: Path
    reason: str
    """Why this profile."""
    arms: list[Arm]
    """The arms chosen: trained ones, then references (`source` tells)."""
    everything: list[Arm]
    """All arms of the study: a chosen one may start from another's weights."""
    published: Path | None
    scaled: list[dict[str, Any]] = field(default_factory=list)
    """Keys of the study that profile or --set changed: key, study, here, where."""
    notices: list[str] = field(default_factory=list)
    source: Path = Path()
    """The profile's file."""
    doubts: list[str] = field(default_factory=list)
    """What is legal here and most likely not meant."""
    normalisation: dict[str, str] = field(default_factory=dict)
    """Dotted path of an encoder's pixels → who says how they are normalised (grid.normalisation)."""
    assumed: list[dict[str, Any]] = field(default_factory=list)
    """Assumptions that no study wrote down: key, value, text."""

    @property
    def headline(self) -> str:
        return f"profile {self.profile.profile} ({self.reason}): {self.profile.about}"


def load(study: str | Path, profile: str | None = None, sets: Sequence[str] = (), arms: Sequence[str] = ()) -> Loaded:
    """Reads and checks everything. Raises UserErrors with all mistakes found."""
    errors: list[UserError] = []
    study_path = Path(study)
    folder = Path(os.path.realpath(study_path)).parent if os.path.islink(study_path) else study_path.parent
    study_tree = _attempt(lambda: yamlfile.read(study_path), errors)
    profile_tree, reason = None, ""
    try:
        profile_path, reason = choose(profile)
        profile_tree = tree_of(profile_path)
    except UserError as error:
        errors.append(error)
    study_sets, profile_sets = _split(sets, errors)
    reader = Reader()
    typed_profile = None
    if profile_tree is not None:
        profile_tree = _set(profile_tree, profile_sets, errors)
        typed_profile = reader.read(Profile, profile_tree)
    typed_study, own = None, study_tree
    if study_tree is not None:
        own, tree = (benchmarks.filled(laid, reader) for laid in _lay(study_tree, typed_profile, study_sets, reader))
        typed_study = reader.read(Study, tree)
        if typed_profile is not None and profile_tree is not None:
            benchmarks.data_sets(typed_profile, profile_tree, tree, reader)
    errors += reader.errors
    if typed_study is None or typed_profile is None or own is None or study_tree is None:
        raise UserErrors(_unique(errors))
    published = folder / typed_study.published if typed_study.published else None
    reader.errors = []
    validate_profile.check_profile(typed_profile, reader)
    pixels = normalisation.fill(typed_profile, reader)
    validate_assets.check_assets(typed_profile, reader)
    wrong = len(reader.errors)
    expanded = expand(typed_study, tree.value["recipe"], reader) if validate.check_axes(typed_study, reader) else []
    validate.check_study(typed_study, typed_profile, expanded, own, reader, complete=len(reader.errors) == wrong)
    expanded = _stand_ins(expanded, typed_study, typed_profile, tree, reader)
    validate.check_connectors(typed_profile, expanded, reader)
    if published and not published.is_file():
        reader.error(
            f"published: no file {typed_study.published!r}", why="it is looked for beside the study", where=reader.marks["published"]
        )
    _made_for(typed_study, typed_profile, [study_path, profile_path], reader)
    if typed_study.general_axis:
        try:
            general_axis.read(folder / typed_study.general_axis.file)
        except UserError as error:
            reader.error(f"general_axis.file: {error.what}", why=error.why, hint=error.hint, at="general_axis.file")
    if errors or reader.errors:
        raise UserErrors(_unique(errors + reader.errors))
    notices = list(compatibility.DIFFERS.get(typed_study.compatibility or "", []))
    chosen = _select(expanded, arms, typed_study)
    file = yamlfile.shown(study_path)
    return Loaded(
        typed_study, typed_profile, file, folder, reason, chosen, expanded, published, list(_changes(own, tree)), notices, profile_path,
        doubts(typed_study, typed_profile, expanded), pixels,
        normalisation.assumptions(typed_profile, pixels, _seeing(chosen, typed_study)),
    )  # fmt: skip


def _made_for(study: Study, profile: Profile, files: Sequence[Path], reader: Reader) -> None:
    """Whether the profile that a study is made for is one: ours, the one in use, or a file beside the study's or the profile's."""
    known = {path.stem for folder in (HERE, *(file.parent for file in files)) for path in folder.glob("*.yaml")}
    if study.made_for is not None and study.made_for not in known | {profile.profile}:
        why = "its overrides wouldn't apply, and no profile has this name here or beside the study"
        names = [path.stem for path in HERE.glob("*.yaml")] + [profile.profile]
        reader.error(f"made_for: unknown profile {study.made_for!r}", why=why, hint=nearest(study.made_for, names), at="made_for")


def _seeing(arms: Sequence[Arm], study: Study) -> set[str]:
    """Encoders and whole models that arms ask for, and the miner."""
    used = {f"encoders.{study.mining.miner}"} if study.mining else set()
    for arm in arms:
        used.add(f"models.{arm.recipe.model}" if arm.recipe.model else f"encoders.{arm.recipe.encoder}")
        used |= {f"models.{arm.released}"} if arm.released else set()
    return used


def _changes(own: Node, tree: Node, path: str = "") -> Iterator[dict[str, Any]]:
    """Leaves of the tree that differ from the study's own."""
    for key, node in tree.value.items():
        here = f"{path}.{key}" if path else key
        before = own.value.get(key)
        if before is node:
            continue
        if before is not None and isinstance(before.value, dict) and isinstance(node.value, dict):
            yield from _changes(before, node, here)
        elif before is None or before.plain() != node.plain():
            yield {"key": here, "study": before.plain() if before else None, "here": node.plain(), "where": node.where}


def _stand_ins(arms: list[Arm], study: Study, profile: Profile, tree: Node, reader: Reader) -> list[Arm]:
    """Released models that the profile trains itself get the recipe for it."""
    made = []
    for arm in arms:
        model = profile.models.get(arm.released or "")
        if model and model.stand_in is not None:
            arm = with_changes(arm, study, tree.value["recipe"], model.stand_in, reader)
        elif model and model.checkpoint is None:
            arm = replace(arm, stands_in=True)
        made.append(arm)
    return made


def _attempt(action: Any, errors: list[UserError]) -> Any:
    try:
        return action()
    except UserErrors as several:
        errors += several.errors
    except UserError as error:
        errors.append(error)
    return None


def _lay(study: Node, profile: Profile | None, sets: list[tuple[list[str], Node]], reader: Reader) -> tuple[Node, Node]:
    """(the study over its compatibility defaults, the same under the profile's overrides and --set)."""
    own = study
    named = study.value.get("compatibility")
    if named is not None and named.value is not None:
        if isinstance(named.value, str) and named.value in compatibility.SETS:
            own = yamlfile.merged(compatibility.tree(named.value), study)
        else:
            said = named.plain()
            reader.error(f"compatibility: unknown set {said!r}", hint=nearest(str(said), compatibility.SETS), where=named.where)
    tree, made_for = own, study.value.get("made_for")
    if profile and profile.overrides and (made_for is None or made_for.value != profile.profile):
        for name, node in profile.overrides.items():
            if name not in _fields(Study):
                reader.error(f"overrides.{name}: no key of a study", hint=nearest(name, _fields(Study)), where=node.where)
            elif name in tree.value:
                tree = Node({**tree.value, name: _overridden(tree.value[name], node, NAMES.get(name, 0))}, tree.file, tree.line)
    return own, _set(tree, sets, reader.errors)


NAMES = {"axes": 2, "benchmarks": 1, "templates": 1, "groups": 1, "base": 1}
"""Study keys below which the names are the study's own, and how many levels of them."""


def _overridden(below: Node, above: Node, names: int) -> Node:
    """`merged`, but names that the study doesn't have are left out: a profile scales what is there. names: levels of names."""
    if not names or not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return yamlfile.merged(below, above)
    inner = {key: _overridden(below.value[key], node, names - 1) for key, node in above.value.items() if key in below.value}
    return Node({**below.value, **inner}, above.file, above.line) if inner else below


def _split(sets: Sequence[str], errors: list[UserError]) -> tuple[list[tuple[list[str], Node]], list[tuple[list[str], Node]]]:
    """--set KEY=VALUE by whether the key is the study's or the profile's."""
    study_keys, profile_keys = _fields(Study), _fields(Profile)
    found: tuple[list, list] = ([], [])
    for text in sets:
        where = f"--set {text}"
        name, equals, value = text.partition("=")
        path = name.strip().split(".")
        if not equals or not all(path):
            errors.append(UserError(f"--set {text!r}", why="KEY=VALUE is expected", hint="for example --set recipe.finetune.batch=64"))
        elif name.strip() == "profile":
            errors.append(UserError(f"--set {text}", why="it is the profile's own name", hint=f"--profile {value.strip() or 'NAME'}"))
        elif path[0] in study_keys or path[0] in profile_keys:
            try:
                node = yamlfile.parse(value, where, lines=False)
            except UserError as error:
                errors.append(error)
                continue
            found[0 if path[0] in study_keys else 1].append((path, node))
        else:
            errors.append(UserError(f"--set {name}: unknown key", hint=nearest(path[0], [*study_keys, *profile_keys])))
    return found


def _set(tree: Node, sets: list[tuple[list[str], Node]], errors: list[UserError]) -> Node:
    """The tree with each setting made that can be; the others' mistakes are in `errors`."""
    for path, node in sets:
        try:
            tree = _assign(tree, path, node)
        except UserError as error:
            errors.append(error)
    return tree


def _assign(tree: Node, path: list[str], leaf: Node) -> Node:
    """The tree with the leaf at the dotted path; keys that hold dots themselves are found whole, items of a list by their number."""
    if not path:
        return leaf
    if isinstance(tree.value, list) and path[0].isdecimal() and int(path[0]) < len(tree.value):
        items = [_assign(item, path[1:], leaf) if n == int(path[0]) else item for n, item in enumerate(tree.value)]
        return Node(items, tree.file, tree.line)
    if tree.value is not None and not isinstance(tree.value, dict):
        there = "a list; its items are numbered from 0" if isinstance(tree.value, list) else repr(tree.value)
        raise UserError(f"nothing can be set at {path[0]!r}", why=f"what is above it is {there}, at {tree.where}", where=leaf.where)
    children = tree.value or {}
    for length in range(len(path), 0, -1):
        name = ".".join(path[:length])
        if name in children or length == 1:
            child = children.get(name, Node({}, leaf.file, leaf.line))
            return Node({**children, name: _assign(child, path[length:], leaf)}, tree.file, tree.line)
    raise AssertionError("a path has a first part")


def _select(arms: list[Arm], globs: Sequence[str], study: Study) -> list[Arm]:
    """The arms whose names match any glob; all without globs."""
    if not globs:
        return arms
    from fnmatch import fnmatchcase

    for glob in globs:
        if not any(fnmatchcase(arm.name, glob) for arm in arms):
            raise UserError(f"--arms {glob!r} matches no arm of {study.study}", hint=nearest(glob, [arm.name for arm in arms]))
    return [arm for arm in arms if any(fnmatchcase(arm.name, glob) for glob in globs)]


def _unique(errors: list[UserError]) -> list[UserError]:
    return list({error.render(): error for error in errors}.values())


def as_plain(value: Any) -> Any:
    """A typed study or profile (or a part) as JSON values."""
    if isinstance(value, Node):
        return value.plain()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name.rstrip("_"): as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    return value
