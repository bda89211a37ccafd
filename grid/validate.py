"""Does a typed study hang together? Names that must be known, values that exclude each other. Mistakes go to the reader with their line."""

from __future__ import annotations

from datasets_ray import benchmarks
from datasets_ray.errors import UserError, nearest
from datasets_ray.schema import Reader
from datasets_ray.yamlfile import Node
from grid.expand import Arm
from grid.profile import Profile
from grid.recipe import Training, _name
from grid.study import Study
from grid.validate_profile import check_training, known, template
from grid.where import parse_where


def check_axes(study: Study, reader: Reader) -> bool:
    """Axes, base and the entries' axis values; True if arms can be expanded."""
    before = len(reader.errors)
    for axis, values in study.axes.items():
        if not values:
            reader.error(f"axes.{axis} has no values", why="an axis varies over at least one value", at=f"axes.{axis}")
        elif len(set(values)) < len(values):
            reader.error(f"axes.{axis}: a value twice", why="each value of an axis is one", at=f"axes.{axis}")
        if axis not in study.base and values:
            hint = f"add `{axis}: {next(iter(values))}`"
            reader.error(f"base: axis {axis!r} is missing", why="the base arm has a value on every axis", hint=hint, at="base")
    _point(study, study.base, "base", reader)
    if not study.arms and not study.references:
        reader.error("arms: none", why="a study has at least one arm", at="arms")
    for index, entry in enumerate(study.arms):
        path = f"arms[{index}]"
        _point(study, entry.at, f"{path}.at", reader)
        for form in ("product", "zip"):
            for axis, values in getattr(entry, form).items():
                if known(axis, study.axes, "axis", f"{path}.{form}.{axis}", reader):
                    for position, value in enumerate(values):
                        _value(study, axis, value, f"{path}.{form}.{axis}[{position}]", reader)
        for axis in (entry.product.keys() & entry.zip.keys()) | (entry.at.keys() & (entry.product.keys() | entry.zip.keys())):
            reader.error(f"{path}: axis {axis!r} is set twice", why="an axis stands in one of `at`, `product` and `zip`", at=path)
        lengths = {axis: len(values) for axis, values in entry.zip.items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{axis} has {n}" for axis, n in lengths.items())
            reader.error(f"{path}.zip: lists of different lengths ({said})", why="zipped axes are taken side by side", at=f"{path}.zip")
        several = len(entry.seeds) > 1 or any(len(values) > 1 for values in [*entry.product.values(), *entry.zip.values()])
        if several and entry.row is not None:
            reader.error(f"{path}.row: one row for several arms", why="a row of the published table is one arm", at=f"{path}.row")
    for index, reference in enumerate(study.references):
        _point(study, reference.at, f"references[{index}].at", reader)
    return len(reader.errors) == before


def _point(study: Study, at: dict[str, str], path: str, reader: Reader) -> None:
    for axis, value in at.items():
        if known(axis, study.axes, "axis", f"{path}.{axis}", reader):
            _value(study, axis, value, f"{path}.{axis}", reader)


def _value(study: Study, axis: str, value: str, path: str, reader: Reader) -> None:
    """Tells a value that the axis doesn't have; an axis without values was told as such."""
    if study.axes[axis]:
        known(value, study.axes[axis], f"value of axis {axis}:", path, reader)


def check_study(study: Study, profile: Profile, arms: list[Arm], own: Node, reader: Reader, complete: bool = True) -> None:
    """Everything that names something else. own: the study's tree before a profile scales it; complete: all arms could be made."""
    for llm, name in study.templates.items():
        template(name, f"templates.{llm}", reader)
    _arms(study, profile, arms, reader)
    _benchmarks(study, profile, arms, reader)
    if complete:
        for index, name in enumerate(study.controls.arms):
            known(name, [arm.name for arm in arms], "arm", f"controls.arms[{index}]", reader)
    _contrasts(study, reader)
    for index, reference in enumerate(study.references):
        known(reference.released, profile.models, "model of the profile", f"references[{index}].released", reader)
    _assumptions(study, own, reader)


def _arms(study: Study, profile: Profile, arms: list[Arm], reader: Reader) -> None:
    """Names that arms use; each name and each training once, at the first arm that has it."""
    seen: set[object] = set()

    def first(*what: object) -> bool:
        fresh = what not in seen
        seen.add(what)
        return fresh

    for arm in arms:
        recipe, where = arm.recipe, arm.where
        if arm.released is None:
            if recipe.model is not None:
                if first("model", recipe.model):
                    own = [name for name, model in profile.models.items() if model.stand_in is None and model.family != "existing"]
                    known(recipe.model, own, "model of the profile", f"arm {arm.name}: model", reader, where)
            else:
                if first("encoder", recipe.encoder):
                    known(recipe.encoder, profile.encoders, "encoder of the profile", f"arm {arm.name}: encoder", reader, where)
                if first("llm", recipe.llm) and known(
                    recipe.llm, profile.llms, "language model of the profile", f"arm {arm.name}: llm", reader, where
                ):
                    _templates(recipe.llm, study, profile, reader, arm)
            if first("init", recipe.init):
                known(recipe.init, ["fresh", *profile.connectors], "connector", f"arm {arm.name}: init", reader, where)
        for name in ("pretrain", "finetune"):
            training: Training = getattr(recipe, name)
            if first(name, id(training)):
                before = len(reader.errors)
                check_training(training, f"recipe.{name}", profile, reader, reader.marks_of(training))
                reader.errors[before:] = [error for error in reader.errors[before:] if first("told", error.what)]


def _templates(llm: str, study: Study, profile: Profile, reader: Reader, arm: Arm) -> None:
    """A language model and those that its weights start from have templates."""
    name: str | None = llm
    seen: set[str] = set()
    while name is not None and name in profile.llms and name not in seen:
        seen.add(name)
        if name not in study.templates:
            hint = f"add `templates: {{{name}: ...}}`"
            what = f"arm {arm.name}: no conversation template for {name!r}"
            reader.error(what, why="each language model has its own", hint=hint, where=reader.marks.get("templates", arm.where))
        name = profile.llms[name].initial


def check_connectors(profile: Profile, arms: list[Arm], reader: Reader) -> None:
    """A connector out of a stand-in's pretraining: the stand-in is a reference of this study and pretrains a connector itself."""
    told = set()
    for arm in arms:
        bridge = profile.connectors.get(arm.recipe.init)
        if bridge is None or bridge.of is None or arm.recipe.init in told:
            continue
        told.add(arm.recipe.init)
        what = f"arm {arm.name}: init {arm.recipe.init!r} comes from the pretraining of model {bridge.of!r}"
        origin = next((other for other in arms if other.released == bridge.of), None)
        if origin is None:
            reader.error(
                what, why="which no reference of this study names", hint=f"add it to `references`: released: {bridge.of}", where=arm.where
            )
        elif origin.recipe.init != "fresh" or origin.recipe.model is not None or "none" in origin.recipe.pretrain.data:
            reader.error(what, why=f"which reference {origin.name!r} doesn't have", where=origin.where)


def _benchmarks(study: Study, profile: Profile, arms: list[Arm], reader: Reader) -> None:
    """Benchmarks, their mining, groups and controls."""
    from datasets_ray.answers import RULES

    if any(benchmark.negatives == "mined" for benchmark in study.benchmarks.values()):
        if study.mining is None:
            hint = "add `mining: {miner: ...}`"
            reader.error("mining: missing", why="a benchmark's wrong options are mined", hint=hint, at="benchmarks")
        elif known(study.mining.miner, profile.encoders, "encoder of the profile", "mining.miner", reader) and any(
            arm.recipe.encoder == study.mining.miner for arm in arms
        ):
            what = f"mining.miner: {study.mining.miner!r} is an arm's encoder"
            reader.error(what, why="its own mistakes would be the wrong options", at="mining.miner")
    if study.mining and "{}" not in study.mining.template:
        reader.error("mining.template has no '{}'", why="it stands for the class name", at="mining.template")
    how = study.evaluation
    first = how.method[0] if isinstance(how.method, list) else how.method
    if how.options == "hidden" and first != "likelihood":
        why, hint = "what isn't shown can only be scored by its likelihood", "method: likelihood, or a list that begins with it"
        reader.error("evaluation.options: hidden", why=why, hint=hint, at="evaluation.options")
    existing = [ref.name for ref in study.references if (asset := profile.models.get(ref.released)) and asset.family == "existing"]
    if how.options == "hidden" and existing:
        what = f"evaluation.options: hidden, and {existing[0]} is a model that is asked as its family asks"
        reader.error(what, why="that prompt lists the options", hint="options: listed", at="evaluation.options")
    for name, benchmark in study.benchmarks.items():
        if benchmark.metric == "circular" and (benchmark.negatives != "given" or benchmark.zeroshot):
            hint = "negatives: given, without zeroshot"
            why = "it counts the rotations of questions that come with their options"
            reader.error(f"benchmarks.{name}.metric: circular", why=why, hint=hint, at=f"benchmarks.{name}.metric")
        if benchmark.data not in profile.data:
            known(benchmark.data, [*profile.data, *benchmarks.names()], "data set of the profile", f"benchmarks.{name}.data", reader)
        known(benchmark.metric, benchmarks.metrics(), "metric", f"benchmarks.{name}.metric", reader)
        if benchmark.rule is not None:
            known(benchmark.rule, RULES, "answer rule", f"benchmarks.{name}.rule", reader)
        if benchmark.templates and benchmark.ensemble:
            why = "one of the two says how classes are written"
            reader.error(f"benchmarks.{name}: `templates` and `ensemble`", why=why, at=f"benchmarks.{name}")
        for index, text in enumerate(benchmark.templates):
            if "{}" not in text and "{c}" not in text:
                at = f"benchmarks.{name}.templates[{index}]"
                reader.error(f"{at} has no '{{}}'", why="it stands for the class name", at=at)
    for group, members in study.groups.items():
        for index, member in enumerate(members):
            known(member, study.benchmarks, "benchmark", f"groups.{group}[{index}]", reader)
        if not members:
            reader.error(f"groups.{group}: no benchmark", why="its mean would be of nothing", at=f"groups.{group}")
        if len(set(members)) < len(members):
            reader.error(f"groups.{group}: a benchmark twice", why="it would count twice in the mean", at=f"groups.{group}")
        if group in study.benchmarks:
            reader.error(f"groups.{group} has the name of a benchmark", why="reports show both by name", at=f"groups.{group}")
    for kind, names in (("benchmarks", study.benchmarks), ("groups", study.groups)):
        for name in names:
            if wrong := _name(name):
                reader.error(f"{kind}.{name}: {wrong}", why="files and metrics are named by it", at=f"{kind}.{name}")
    known(study.evaluation.rule, RULES, "answer rule", "evaluation.rule", reader)
    for index, name in enumerate(study.controls.benchmarks):
        known(name, study.benchmarks, "benchmark", f"controls.benchmarks[{index}]", reader)


def _contrasts(study: Study, reader: Reader) -> None:
    seen: dict[str, int] = {}
    for index, contrast in enumerate(study.contrasts):
        path = f"contrasts[{index}]"
        if contrast.name in seen:
            why = f"also at {reader.marks[f'contrasts[{seen[contrast.name]}]']}"
            reader.error(f"{path}: contrast {contrast.name!r} twice", why=why, at=path)
        seen.setdefault(contrast.name, index)
        if known(contrast.axis, study.axes, "axis", f"{path}.axis", reader):
            sides = {"from": contrast.from_.split("|"), "to": contrast.to.split("|")}
            for side, values in sides.items():
                for value in values:
                    _value(study, contrast.axis, value, f"{path}.{side}", reader)
            if set(sides["from"]) & set(sides["to"]):
                reader.error(f"{path}: the same value before and after", why="the two sides of an effect differ", at=path)
        try:
            clauses = parse_where(contrast.where, study.axes)
        except UserError as error:
            reader.error(f"{path}.where: {error.what}", why=error.why, hint=error.hint, at=f"{path}.where")
            continue
        for clause in clauses:
            for value in clause.values if clause.key in study.axes else ():
                _value(study, clause.key, value, f"{path}.where", reader)


def _assumptions(study: Study, own: Node, reader: Reader) -> None:
    """An assumption stands beside its value: the key exists and has that value in the file (before a profile scales it)."""
    for index, assumption in enumerate(study.assumptions):
        path, node = f"assumptions[{index}]", own
        rest = assumption.key.split(".")
        while rest:
            children = _children(node)
            length = next((n for n in range(len(rest), 0, -1) if ".".join(rest[:n]) in children), 0)
            if not length:
                what = f"{path}.key: no key {assumption.key!r} in this file"
                reader.error(what, hint=nearest(rest[0], children), at=f"{path}.key")
                break
            node, rest = children[".".join(rest[:length])], rest[length:]
        else:
            actual = node.plain()
            if not isinstance(actual, dict) and actual != assumption.value:
                why = f"{assumption.key} is {str(actual)[:80]!r} at {node.where}"
                reader.error(f"{path}.value: {assumption.value!r} is not the file's value", why=why, at=f"{path}.value")


def _children(node: Node) -> dict[str, Node]:
    """Keys of a mapping; items of a list (arms, contrasts) by their name."""
    if isinstance(node.value, list):
        return {item.value["name"].plain(): item for item in node.value if isinstance(item.value, dict) and "name" in item.value}
    return node.value if isinstance(node.value, dict) else {}
