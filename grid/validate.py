"""Does a typed study hang together? Names that must be known, values that exclude each other. Mistakes go to the reader with their line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets_ray.errors import nearest
from grid.expand import Arm
from grid.profile import Asset, Profile
from grid.schema import Reader
from grid.study import Study, Training
from grid.yamlfile import Node

PARTS = ("encoder", "connector", "llm")
CONDITION = re.compile(r"\s*([\w-]+)\s*(!?=)\s*([^;=!]+?)\s*$")


def conditions(where: str) -> list[tuple[str, bool, list[str]]]:
    """`axis=a|b;row!=2` → [(axis, equal?, values)]. ValueError with the part that isn't one."""
    found = []
    for part in where.split(";"):
        if part.strip():
            match = CONDITION.match(part)
            if not match:
                raise ValueError(part.strip())
            found.append((match[1], match[2] == "=", [value.strip() for value in match[3].split("|")]))
    return found


def _known(name: str, known: Iterable[str], what: str, path: str, reader: Reader, where: str | None = None) -> bool:
    known = list(known)
    if name in known:
        return True
    reader.error(f"{path}: unknown {what} {name!r}", hint=nearest(name, known), where=where or reader.marks.get(path, ""))
    return False


def check_axes(study: Study, reader: Reader) -> bool:
    """Axes, base and the entries' axis values; True if arms can be expanded."""
    before = len(reader.errors)
    for axis, values in study.axes.items():
        if not values:
            reader.error(f"axes.{axis} has no values", why="an axis varies over at least one value", where=reader.marks[f"axes.{axis}"])
        if axis not in study.base and values:
            reader.error(f"base: axis {axis!r} is missing", why="the base arm has a value on every axis", hint=f"add `{axis}: {next(iter(values))}`", where=reader.marks["base"])

    def point(at: dict[str, str], path: str) -> None:
        for axis, value in at.items():
            if _known(axis, study.axes, "axis", f"{path}.{axis}", reader):
                _known(value, study.axes[axis], f"value of axis {axis}:", f"{path}.{axis}", reader)

    point(study.base, "base")
    if not study.arms and not study.references:
        reader.error("arms: none", why="a study has at least one arm", where=reader.marks["arms"])
    for index, entry in enumerate(study.arms):
        path = f"arms[{index}]"
        point(entry.at, f"{path}.at")
        for form in ("product", "zip"):
            for axis, values in getattr(entry, form).items():
                if _known(axis, study.axes, "axis", f"{path}.{form}.{axis}", reader):
                    for position, value in enumerate(values):
                        _known(value, study.axes[axis], f"value of axis {axis}:", f"{path}.{form}.{axis}[{position}]", reader)
        for axis in entry.product.keys() & entry.zip.keys() | (entry.at.keys() & (entry.product.keys() | entry.zip.keys())):
            reader.error(f"{path}: axis {axis!r} is set twice", why="an axis stands in one of `at`, `product` and `zip`", where=reader.marks[path])
        lengths = {axis: len(values) for axis, values in entry.zip.items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{axis} has {n}" for axis, n in lengths.items())
            reader.error(f"{path}.zip: lists of different lengths ({said})", why="zipped axes are taken side by side", where=reader.marks[f"{path}.zip"])
        several = len(entry.seeds) > 1 or any(len(values) > 1 for values in [*entry.product.values(), *entry.zip.values()])
        if several and entry.row is not None:
            reader.error(f"{path}.row: one row for several arms", why="a row of the published table is one arm", where=reader.marks[f"{path}.row"])
    for index, reference in enumerate(study.references):
        point(reference.at, f"references[{index}].at")
    return len(reader.errors) == before


def check_training(training: Training, path: str, profile: Profile, reader: Reader, where: str, parts: tuple[str, ...] = PARTS) -> None:
    """One training stage's data, duration, parts and objective."""
    names = [training.data] if isinstance(training.data, str) else training.data
    for name in names:
        if name != "none":
            _known(name, profile.data, "data set", f"{path}.data", reader, reader.marks.get(f"{path}.data", where))
    if not names:
        reader.error(f"{path}.data: no data set", hint="name one of the profile, or `none`", where=where)
    if "none" not in names and (training.epochs is None) == (training.steps is None):
        reader.error(f"{path}: {'both' if training.epochs else 'neither'} `epochs` and `steps`", why="one of the two says how long", hint="set the other to null", where=where)
    for phase in training.phases:
        for part in phase.learning_rates:
            _known(part, parts, "part", f"{path}.phases.learning_rates.{part}", reader, where)
    objectives = [p.stem for p in (Path(__file__).resolve().parent.parent / "trainers" / "objectives").glob("*.py") if not p.stem.startswith("_")]
    name = training.objective.get("name")
    if not isinstance(name, str):
        reader.error(f"{path}.objective: no `name`", hint="objective: {name: next_token}", where=where)
    elif objectives:
        _known(name, objectives, "objective", f"{path}.objective.name", reader, where)


def check_profile(profile: Profile, reader: Reader) -> None:
    """Assets: where weights and rows come from."""
    for kind in ("encoders", "llms", "models"):
        assets: dict[str, Any] = getattr(profile, kind)
        for name, asset in assets.items():
            path, where = f"{kind}.{name}", reader.marks[f"{kind}.{name}"]
            initial = getattr(asset, "initial", None)
            if initial is not None and _known(initial, assets, kind[:-1], f"{path}.initial", reader) and _circle(name, assets):
                reader.error(f"{path}.initial: a circle", why="its initial weights come from itself", where=where)
            _one_origin(asset, path, reader, where)
            allowed = ("encoder",) if kind == "encoders" else ("llm",) if kind == "llms" else PARTS
            for index, training in enumerate(asset.trained):
                inner = f"{path}.trained[{index}]"
                check_training(training, inner, profile, reader, reader.marks[inner], allowed)
    for name, bridge in profile.connectors.items():
        path = f"connectors.{name}"
        if (bridge.of is None) == (bridge.checkpoint is None):
            reader.error(f"{path}: one of `checkpoint` and `of`", why="a released connector has one origin", where=reader.marks[path])
        elif bridge.of is not None and _known(bridge.of, profile.models, "model", f"{path}.of", reader) and profile.models[bridge.of].stand_in is None:
            reader.error(f"{path}.of: {bridge.of!r} has no `stand_in`", why="only a model trained here has a pretraining to take it from", where=reader.marks[path])
    for name, data in profile.data.items():
        path, where = f"data.{name}", reader.marks[f"data.{name}"]
        if (data.source is None) == (not data.concat):
            reader.error(f"{path}: one of `source` and `concat`", why="rows come from a reader or from other sets", where=where)
        for other in data.concat:
            _known(other, [n for n, d in profile.data.items() if n != name and not d.concat], "data set", f"{path}.concat", reader)
        if data.source is not None and data.rows is None and not isinstance(data.keys.get("rows"), int):
            reader.error(f"{path}: no number of rows", why="batch arithmetic needs it", hint="add `rows:`, or `keys: {rows: ...}` where the source takes it", where=where)


def _circle(name: str, assets: dict[str, Any]) -> bool:
    seen = {name}
    current = assets[name].initial
    while current is not None and current in assets:
        if current in seen:
            return True
        seen.add(current)
        current = assets[current].initial
    return False


def _one_origin(asset: Asset, path: str, reader: Reader, where: str) -> None:
    initial, stand_in = getattr(asset, "initial", None), getattr(asset, "stand_in", None)
    origins = [asset.config is not None, asset.checkpoint is not None, initial is not None, stand_in is not None]
    if asset.config is not None and asset.checkpoint is not None:
        origins.remove(True)  # a library's architecture by name, and its weights
    if sum(origins) != 1:
        reader.error(f"{path}: {'several origins' if sum(origins) else 'no origin'}", why="weights come from `checkpoint`, `config` with `trained`, or `initial` with `trained`", where=where)
    elif asset.checkpoint is None and stand_in is None and not asset.trained:
        reader.error(f"{path}: nothing trains it", why="fresh weights know nothing", hint="add `trained: [...]` or a `checkpoint`", where=where)


def check_study(study: Study, profile: Profile, arms: list[Arm], own: Node, reader: Reader) -> None:
    """Everything that names something else."""
    for arm in arms:
        _arm(arm, study, profile, reader)
    trained = [arm.name for arm in arms]
    if any(b.negatives == "mined" for b in study.benchmarks.values()):
        if study.mining is None:
            reader.error("mining: missing", why="a benchmark's wrong options are mined", hint="add `mining: {miner: ...}`", where=reader.marks["benchmarks"])
        elif _known(study.mining.miner, profile.encoders, "encoder of the profile", "mining.miner", reader) and study.mining.miner in {a.recipe.encoder for a in arms}:
            reader.error(f"mining.miner: {study.mining.miner!r} is an arm's encoder", why="its own mistakes would be the wrong options", where=reader.marks["mining.miner"])
        if study.mining and "{}" not in study.mining.template:
            reader.error("mining.template has no '{}'", why="it stands for the class name", where=reader.marks["mining.template"])
    for name, benchmark in study.benchmarks.items():
        _known(benchmark.data, profile.data, "data set of the profile", f"benchmarks.{name}.data", reader)
    for group, members in study.groups.items():
        for index, member in enumerate(members):
            _known(member, study.benchmarks, "benchmark", f"groups.{group}[{index}]", reader)
        if not members:
            reader.error(f"groups.{group}: no benchmark", why="its mean would be of nothing", where=reader.marks[f"groups.{group}"])
    for index, arm_name in enumerate(study.controls.arms):
        _known(arm_name, trained, "arm", f"controls.arms[{index}]", reader)
    for index, name in enumerate(study.controls.benchmarks):
        _known(name, study.benchmarks, "benchmark", f"controls.benchmarks[{index}]", reader)
    _contrasts(study, reader)
    for index, reference in enumerate(study.references):
        _known(reference.released, profile.models, "model of the profile", f"references[{index}].released", reader)
    _assumptions(study, own, reader)


def _arm(arm: Arm, study: Study, profile: Profile, reader: Reader) -> None:
    recipe = arm.recipe
    if arm.released is None:
        if recipe.model is not None:
            _known(recipe.model, profile.models, "model of the profile", f"arm {arm.name}: model", reader, arm.where)
        else:
            _known(recipe.encoder, profile.encoders, "encoder of the profile", f"arm {arm.name}: encoder", reader, arm.where)
            if _known(recipe.llm, profile.llms, "language model of the profile", f"arm {arm.name}: llm", reader, arm.where) and recipe.llm not in study.templates:
                hint = f"add `templates: {{{recipe.llm}: ...}}`"
                reader.error(f"arm {arm.name}: no conversation template for {recipe.llm!r}", why="each language model has its own", hint=hint, where=reader.marks.get("templates", arm.where))
        if recipe.init != "fresh":
            _known(recipe.init, ["fresh", *profile.connectors], "connector", f"arm {arm.name}: init", reader, arm.where)
    for name in ("pretrain", "finetune"):
        training: Training = getattr(recipe, name)
        if "none" not in training.data:
            check_training(training, f"recipe.{name}", profile, reader, reader.marks.get(f"recipe.{name}", arm.where))


def _contrasts(study: Study, reader: Reader) -> None:
    seen: dict[str, int] = {}
    for index, contrast in enumerate(study.contrasts):
        path = f"contrasts[{index}]"
        if contrast.name in seen:
            reader.error(f"{path}: contrast {contrast.name!r} twice", why=f"also at {reader.marks[f'contrasts[{seen[contrast.name]}]']}", where=reader.marks[path])
        seen.setdefault(contrast.name, index)
        if _known(contrast.axis, study.axes, "axis", f"{path}.axis", reader):
            for side, values in (("from", contrast.from_), ("to", contrast.to)):
                for value in values.split("|"):
                    _known(value, study.axes[contrast.axis], f"value of axis {contrast.axis}:", f"{path}.{side}", reader)
        try:
            parts = conditions(contrast.where)
        except ValueError as error:
            reader.error(f"{path}.where: {str(error)!r} is no condition", why="`axis=a|b;axis!=c;row!=2`", where=reader.marks[f"{path}.where"])
            continue
        for axis, _, values in parts:
            if axis != "row" and _known(axis, [*study.axes, "row"], "axis", f"{path}.where", reader):
                for value in values:
                    _known(value, study.axes[axis], f"value of axis {axis}:", f"{path}.where", reader)


def _assumptions(study: Study, own: Node, reader: Reader) -> None:
    """An assumption stands beside its value: the key exists and has that value in the file (before a profile scales it)."""
    for index, assumption in enumerate(study.assumptions):
        path, node = f"assumptions[{index}]", own
        rest = assumption.key.split(".")
        while rest:
            children = node.value if isinstance(node.value, dict) else {}
            if isinstance(node.value, list):  # arms and contrasts by their name
                children = {item.value["name"].plain(): item for item in node.value if isinstance(item.value, dict) and "name" in item.value}
            length = next((n for n in range(len(rest), 0, -1) if ".".join(rest[:n]) in children), 0)
            if not length:
                reader.error(f"{path}.key: no key {assumption.key!r} in this file", hint=nearest(rest[0], children), where=reader.marks[f"{path}.key"])
                break
            node, rest = children[".".join(rest[:length])], rest[length:]
        else:
            actual = node.plain()
            if not isinstance(actual, dict) and actual != assumption.value:
                why = f"{assumption.key} is {str(actual)[:80]!r} at {node.where}"
                reader.error(f"{path}.value: {assumption.value!r} is not the file's value", why=why, where=reader.marks[f"{path}.value"])
