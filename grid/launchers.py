"""Launcher files held against the profile: will this file start a cluster that the study fits on, safely? Nothing is started.

In: a launcher file (read by grid/launcher_files.py), the loaded study and profile. Out: a sentence about
what the file starts, or every mistake at once, each with its line and its way out. Used by `grid.check --launcher FILE`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from datasets_ray.errors import UserError, UserErrors
from grid.load import Loaded
from grid.plan import run_section

PLACEHOLDER = "REPLACE-ME"
SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_?KEY)$", re.IGNORECASE)
"""Names whose value nobody else should read. A name that ends in _PATH or _FILE only says where it lies."""
ASSIGNED = re.compile(r"\b([A-Za-z_][A-Za-z0-9_]*)=(\"[^\"$]+\"|'[^']+'|[^\s\"'$;&|()]+)")
"""NAME=literal in a shell's words; a value that starts with $ comes from elsewhere."""
KNOWN_SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----")


@dataclass
class Group:
    """Nodes of one kind."""

    name: str
    nodes: int
    cpus: float
    """Of each node, as Ray will count them."""
    gpus: int
    where: str
    environment: dict[str, str] = field(default_factory=dict)
    """What processes of Ray find in their environment; a value taken from a secret is ''."""
    storage: dict[str, str] = field(default_factory=dict)
    """Path → what lies there, the same text for the same storage. Only what all nodes can share."""
    head: bool = False


@dataclass
class Launch:
    """What a launcher file says."""

    kind: str
    file: str
    text: str
    groups: list[Group]
    command: list[str] | None
    """The study's command; None where the file starts a cluster only."""
    command_where: str = ""
    token: bool = False
    """Every process of Ray asks for a token that isn't in the file."""
    token_hint: str = ""
    sensible: list[UserError] = field(default_factory=list)
    """Mistakes that only this kind of file can have."""


def check(path: str | Path, loaded: Loaded) -> str:
    """What the file starts, in a sentence. Raises UserErrors with everything that is wrong."""
    from grid.launcher_files import read

    launch = read(Path(path))
    errors = [
        *launch.sensible, *_placeholders(launch), *_secrets(launch), *_token(launch), *_sizes(launch, loaded), *_command(launch, loaded),
        *_storage(launch, loaded),
    ]  # fmt: skip
    if errors:
        raise UserErrors(errors)
    nodes = sum(group.nodes for group in launch.groups)
    told = f"{launch.kind}: {nodes} nodes, {sum(g.nodes * g.gpus for g in launch.groups)} GPUs"
    return told + (", runs the study" if launch.command else ", a cluster to submit the study to")


def _placeholders(launch: Launch) -> Iterator[UserError]:
    """Lines that only the user can fill."""
    for number, line in enumerate(launch.text.splitlines(), 1):
        if PLACEHOLDER in line:
            why = "it stands for what only you know"
            yield UserError(f"{line.strip()}", why=why, hint=f"put your own in place of {PLACEHOLDER}", where=f"{launch.file}:{number}")


def _secrets(launch: Launch) -> Iterator[UserError]:
    """Tokens, passwords and keys that stand in the file."""
    for number, line in enumerate(launch.text.splitlines(), 1):
        named = [name for name, value in ASSIGNED.findall(line) if is_secret(name) and PLACEHOLDER not in value]
        if named or KNOWN_SECRETS.search(line):
            what = f"a secret stands in the file{': ' + ', '.join(named) if named else ''}"
            hint = "keep it in a secret of the cluster or in a file of your own, and name that here"
            yield UserError(what, why="files like this are shared and kept", hint=hint, where=f"{launch.file}:{number}")


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds something to keep to oneself."""
    return SECRET.search(name) is not None


def _token(launch: Launch) -> Iterator[UserError]:
    if not launch.token:
        why = "whoever reaches a port of the cluster could run anything on it"
        yield UserError("Ray asks nobody for a token", why=why, hint=launch.token_hint, where=launch.file)


def _sizes(launch: Launch, loaded: Loaded) -> Iterator[UserError]:
    """GPUs in whole lanes, a CPU for every worker and one a node for Ray Data."""
    resources = loaded.profile.resources
    each, lane = resources.gpus_per_worker, resources.workers * resources.gpus_per_worker
    where = next((group.where for group in launch.groups if group.gpus), launch.file)
    total = sum(group.nodes * group.gpus for group in launch.groups)
    if not each:
        if total:
            why = f"profile {loaded.profile.profile} computes on {resources.device}"
            yield UserError(f"{total} GPUs and none is used", why=why, hint="--set resources.gpus_per_worker=1", where=where)
        return
    wanted = lane * max(1, resources.lanes)
    if total < wanted or (total % lane if not resources.lanes else total != wanted):
        why = f"{max(1, resources.lanes)} lane(s) of {resources.workers} workers with {each} GPU(s) are {wanted}"
        hint = f"nodes x GPUs = {wanted}{' or a multiple of it' if not resources.lanes else ''}, or --set resources.workers=N"
        yield UserError(f"{total} GPUs, the profile needs {wanted}", why=why, hint=hint, where=where)
    for group in launch.groups:
        if not group.gpus:
            continue
        if group.gpus % each:
            what = f"{group.gpus} GPUs on a node of {group.name}, {each} a worker"
            yield UserError(what, why="a worker's GPUs are of one node", hint="resources.gpus_per_worker divides them", where=group.where)
        need = group.gpus // each + 1
        if group.cpus < need:
            what = f"{group.cpus:g} CPUs on a node of {group.name}, {need} are needed"
            yield UserError(what, why="one for each worker and one for Ray Data", hint=f"give the node {need} or more", where=group.where)


def _command(launch: Launch, loaded: Loaded) -> Iterator[UserError]:
    """The command runs this study at this profile."""
    if launch.command is None:
        return
    where = launch.command_where or launch.file
    study, options = arguments(launch.command)
    if study is None:
        hint = f"python -m grid.run {loaded.file} --profile ..."
        yield UserError("no grid.run in the command", why=" ".join(launch.command)[:120] or "it is empty", hint=hint, where=where)
        return
    if not _same_file(study, loaded.file):
        yield UserError(f"it runs {study}", why=f"you are checking {loaded.file}", hint=f"python -m grid.run {loaded.file}", where=where)
    named = [*options.get("--profile", []), _environment(launch).get("FINEGRID_PROFILE", ""), "tiny"]
    profile = next(name for name in named if name)
    if Path(profile).stem != loaded.source.stem:
        hint = f"--profile {loaded.source.stem}"
        yield UserError(f"it runs at profile {profile}", why=f"you are checking {loaded.source.stem}", hint=hint, where=where)


def arguments(command: list[str]) -> tuple[str | None, dict[str, list[str]]]:
    """(study, option → its values) of a grid.run command line; None where there is none in it."""
    words = list(command)
    start = next((i + 1 for i, word in enumerate(words) if word == "grid.run"), None)
    if start is None:
        start = next((i + 2 for i in range(len(words) - 1) if Path(words[i]).name == "finegrid" and words[i + 1] == "run"), None)
    if start is None:
        return None, {}
    study, options, last = None, dict[str, list[str]](), ""
    for word in words[start:]:
        if word.startswith("--"):
            last, _, value = word.partition("=") if not word.startswith("--set=") else ("--set", "=", word.removeprefix("--set="))
            options.setdefault(last, []).extend([value] if value else [])
        elif last in ("--profile", "--out", "--set") and (last == "--set" or not options[last]):
            options[last].append(word)
            last = ""
        elif last == "--arms":
            options[last].append(word)
        elif study is None:
            study = word
    return study, options


def _same_file(one: str, other: str) -> bool:
    """Whether two paths may be one file on two machines: equal as far as both go, two steps at most."""
    first, second = PurePosixPath(os.path.normpath(one)).parts, PurePosixPath(os.path.normpath(other)).parts
    depth = min(2, len(first), len(second))
    return first[-depth:] == second[-depth:]


def _environment(launch: Launch) -> dict[str, str]:
    return next((group.environment for group in launch.groups if group.head), {})


def _storage(launch: Launch, loaded: Loaded) -> Iterator[UserError]:
    """Store, data sets and run directory lie where every node sees the same, and are what the profile says."""
    section = run_section(loaded.profile)
    options = arguments(launch.command)[1] if launch.command else {}
    sets = dict(text.split("=", 1) for text in options.get("--set", []) if "=" in text)
    environment = _environment(launch)
    places = {
        "store": (section["store"], sets.get("store") or environment.get("FINEGRID_STORE"), "FINEGRID_STORE"),
        "data_root": (section["data_root"], sets.get("data_root") or environment.get("FINEGRID_DATA"), "FINEGRID_DATA"),
    }
    for key, (profiles, given, variable) in places.items():
        if profiles and given and PurePosixPath(profiles) != PurePosixPath(given):
            what, why = f"{key} is {given} here and {profiles} in the profile", "the profile's is what the study would use"
            yield UserError(what, why=why, hint=f"one of the two: {variable}, or `{key}:` in the profile", where=launch.file)
        elif not (profiles or given):
            why = "nodes would each look beside themselves" if key == "store" else "no data set would be found"
            yield UserError(
                f"no {key}", why=why, hint=f"{variable}=DIR for every process of Ray, or `{key}:` in the profile", where=launch.file
            )
        else:
            yield from _everywhere(launch, key, profiles or given or "")
    if launch.command is not None and arguments(launch.command)[0] is not None:
        out = next(iter(options.get("--out", [])), None)
        if out is None:
            hint = "--out DIR on the shared storage"
            yield UserError("no --out", why="the run directory would lie on one node alone", hint=hint, where=launch.command_where)
        else:
            yield from _everywhere(launch, "--out", out)


def _everywhere(launch: Launch, what: str, path: str) -> Iterator[UserError]:
    """The path lies on storage that is the same on all nodes."""
    place = PurePosixPath(path)
    seen: dict[str, list[str]] = {}
    for group in launch.groups:
        if not group.nodes:
            continue
        below = [mount for mount in group.storage if place == PurePosixPath(mount) or PurePosixPath(mount) in place.parents]
        if not below:
            hint = f"mount the shared storage so that it holds {path}, on every node"
            yield UserError(f"{what} {path} is not shared by {group.name}", why="no shared storage there", hint=hint, where=group.where)
            continue
        seen.setdefault(group.storage[max(below, key=len)], []).append(group.name)
    if len(seen) > 1:
        told = "; ".join(f"{', '.join(names)}: {storage}" for storage, names in seen.items())
        yield UserError(f"{what} {path} is not the same storage on all nodes", why=told, hint="one claim for all", where=launch.file)
