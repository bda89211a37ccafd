"""Does a typed profile hang together? Where weights and rows come from, and what trains them. Mistakes go to the reader with their line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from datasets_ray.errors import UserError, nearest
from datasets_ray.schema import Reader, registered
from grid import devices, signatures
from grid.profile import Asset, Profile
from grid.recipe import Training
from trainers import families

PARTS = ("encoder", "connector", "llm")


def known(name: str, names: Iterable[str], what: str, path: str, reader: Reader, where: str = "") -> bool:
    """Whether a name is one of the names; else the mistake is told, with the nearest one."""
    names = list(names)
    if name in names:
        return True
    reader.error(f"{path}: unknown {what} {name!r}", hint=nearest(name, names), where=where, at=path)
    return False


def objectives() -> tuple[str, ...]:
    """Names registered in trainers/objectives."""
    return registered("trainers/objectives/__init__.py", "OBJECTIVES")


def check_training(
    training: Training, path: str, profile: Profile, reader: Reader, marks: dict[str, str], parts: tuple[str, ...] = PARTS
) -> None:
    """One training stage's data, duration, parts, objective and template. marks: where its keys stand."""
    where = marks[path]
    names = [training.data] if isinstance(training.data, str) else training.data
    for name in names:
        if name != "none":
            known(name, profile.data, "data set", f"{path}.data", reader, marks.get(f"{path}.data", where))
    if not names:
        reader.error(f"{path}.data: no data set", hint="name one of the profile, or `none`", where=where)
    if "none" in names and len(names) > 1:
        reader.error(f"{path}.data: `none` beside others", why="it leaves the stage out", where=where)
    if "none" not in names and (training.epochs is None) == (training.steps is None):
        given = "both" if training.epochs is not None else "neither"
        reader.error(f"{path}: {given} `epochs` and `steps`", why="one of the two says how long", hint="set the other to null", where=where)
    for index, phase in enumerate(training.phases):
        for part in phase.learning_rates:
            here = f"{path}.phases[{index}].learning_rates.{part}"
            known(part, parts, "part", here, reader, marks[here])
    learned = {part for phase in training.phases for part in phase.learning_rates}
    for part in training.adapters:
        here = f"{path}.adapters.{part}"
        if known(part, ["llm"], "part for adapters", here, reader, marks.get(here, where)) and part not in learned:
            hint = f"add `{part}: RATE` to a phase's learning_rates"
            why, there = "adapters learn at their part's rate", marks.get(here, where)
            reader.error(f"{here}: no phase trains {part}", why=why, hint=hint, where=there)
    objective = training.objective.get("name")
    if not isinstance(objective, str):
        reader.error(f"{path}.objective: no `name`", hint="objective: {name: next_token}", where=where)
    elif ":" in objective or known(
        objective, objectives(), "objective", f"{path}.objective.name", reader, marks.get(f"{path}.objective", where)
    ):
        _keys_of(training.objective, f"{path}.objective", reader, marks, where)
    if training.template is not None:
        template(training.template, f"{path}.template", reader, marks.get(f"{path}.template", where))


def _keys_of(objective: dict[str, Any], path: str, reader: Reader, marks: dict[str, str], where: str) -> None:
    """Whether an objective takes the keys that it is given."""
    try:
        wrong = signatures.mistakes(objective)
    except UserError as error:
        wrong = [error]
    for told in wrong:
        place = marks.get(f"{path}.{told.where}") or marks.get(path, where)
        reader.error(f"{path}: {told.what}", why=told.why, hint=told.hint, where=place)


def template(name: str, path: str, reader: Reader, where: str = "") -> bool:
    """Whether a conversation template exists."""
    return known(name, registered("datasets_ray/prompts.py", "TEMPLATES"), "conversation template", path, reader, where)


def check_profile(profile: Profile, reader: Reader) -> None:
    """Every asset of every kind, and the device."""
    device = profile.device
    try:
        device.tflops, device.memory_gib, device.host_gib = devices.resolve(
            device.name, profile.precision, device.tflops, device.memory_gib, device.host_gib
        )
    except UserError as error:
        reader.error(f"device.name: {error.what}", why=error.why, hint=error.hint, at="device.name")
    for kind in ("encoders", "llms", "models"):
        assets: dict[str, Any] = getattr(profile, kind)
        for name, asset in assets.items():
            path = f"{kind}.{name}"
            initial = getattr(asset, "initial", None)
            if initial is not None and known(initial, assets, f"one of {kind}", f"{path}.initial", reader) and _circle(name, assets):
                reader.error(f"{path}.initial: a circle", why="its initial weights come from itself", at=path)
            _origin(asset, path, reader)
            if kind == "models":
                _existing(asset, path, reader)
            if kind == "models" and asset.family == "vlm" and asset.checkpoint and set(asset.config or {}) != set(PARTS):
                why = "a released vlm is built part by part"
                reader.error(f"{path}.config: not its three parts", why=why, hint=f"config: {{{', '.join(PARTS)}}}", at=path)
            allowed = ("encoder",) if kind == "encoders" else ("llm",) if kind == "llms" else PARTS
            for index, training in enumerate(asset.trained):
                inner = f"{path}.trained[{index}]"
                check_training(training, inner, profile, reader, reader.marks, allowed)
    for name, bridge in profile.connectors.items():
        path = f"connectors.{name}"
        if (bridge.of is None) == (bridge.checkpoint is None):
            reader.error(f"{path}: one of `checkpoint` and `of`", why="a released connector has one origin", at=path)
        elif bridge.of and known(bridge.of, profile.models, "model", f"{path}.of", reader) and profile.models[bridge.of].stand_in is None:
            why = "only a model trained here has a pretraining to take it from"
            reader.error(f"{path}.of: {bridge.of!r} has no `stand_in`", why=why, at=path)
    for name, data in profile.data.items():
        path = f"data.{name}"
        if (data.source is None) == (not data.concat):
            reader.error(f"{path}: one of `source` and `concat`", why="rows come from a reader or from other sets", at=path)
        for other in data.concat:
            single = [n for n, d in profile.data.items() if n != name and not d.concat]
            known(other, single, "data set", f"{path}.concat", reader)
        said = data.keys.get("rows")
        counted = isinstance(said, int) and not isinstance(said, bool)
        if said is not None and not counted:
            reader.error(f"{path}.keys: rows {said!r}", why="a whole number is expected", at=f"{path}.keys")
        elif data.source is not None and (data.rows or data.expect) is None and not counted:
            hint = "add `rows:` or `expect:`, or `keys: {rows: ...}` where the source takes it"
            reader.error(f"{path}: no number of rows", why="batch arithmetic needs it", hint=hint, at=path)


def _existing(asset: Any, path: str, reader: Reader) -> None:
    """A released model that is asked through its own processor: a checkpoint, a family of prompts, and its own code only on purpose."""
    if asset.family != "existing":
        if asset.prompts or asset.remote_code:
            what, why = f"{path}: `prompts` or `remote_code`", "they are of `family: existing`"
            reader.error(what, why=why, hint="family: existing", at=path)
        return
    if asset.checkpoint is None or asset.trained:
        reader.error(f"{path}: an existing model is a `checkpoint`, and nothing trains it", why="it is only asked", at=path)
    if asset.prompts is None:
        reader.error(f"{path}.prompts: missing", why="how is its family asked?", hint=f"one of {', '.join(families.names())}", at=path)
    elif known(asset.prompts, families.names(), "prompt family", f"{path}.prompts", reader):
        refused = families.refusal(asset.prompts, asset.remote_code)
        if refused is not None:
            reader.error(f"{path}: {asset.prompts!r} can't be asked", why=refused[0], hint=refused[1], at=f"{path}.prompts")
    if asset.remote_code and asset.revision is None and asset.checkpoint and not os.path.isdir(asset.checkpoint):
        why = "what its code does may change any day"
        reader.error(f"{path}: `remote_code` without `revision`", why=why, hint="revision: the commit whose code you read", at=path)


def _circle(name: str, assets: dict[str, Any]) -> bool:
    seen, current = {name}, assets[name].initial
    while current is not None and current in assets:
        if current in seen:
            return True
        seen.add(current)
        current = assets[current].initial
    return False


def _origin(asset: Asset, path: str, reader: Reader) -> None:
    """Weights have one origin, and fresh ones are trained."""
    initial, stand_in = getattr(asset, "initial", None), getattr(asset, "stand_in", None)
    origins = sum([asset.config is not None or asset.checkpoint is not None, initial is not None, stand_in is not None])
    if origins != 1:
        why = "weights come from `checkpoint`, from `config` with `trained`, or from `initial` with `trained`"
        reader.error(f"{path}: {'several origins' if origins else 'no origin'}", why=why, at=path)
    elif asset.checkpoint is None and stand_in is None and not asset.trained:
        reader.error(f"{path}: nothing trains it", why="fresh weights know nothing", hint="add `trained: [...]` or a `checkpoint`", at=path)
    if asset.revision is not None and asset.checkpoint is None:
        reader.error(f"{path}.revision without `checkpoint`", why="it is a checkpoint's revision", at=f"{path}.revision")
