"""Reads launcher files: a KubeRay RayJob here, a cluster of Ray's own launcher and a Slurm script in grid/launcher_scripts.py.

In: a file. Out: `grid.launchers.Launch`: nodes with what they have, where storage lies, the study's command, whether a token is asked for,
and mistakes that only this kind of file can have. Nothing is run.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from datasets_ray import yamlfile
from datasets_ray.errors import UserError
from datasets_ray.yamlfile import Node
from grid.launchers import Group, Launch, is_secret

GPU = "nvidia.com/gpu"


def read(path: Path) -> Launch:
    """What the file says, by its kind. Raises UserError for a file of no known kind."""
    name = yamlfile.shown(path)
    if not path.is_file():
        raise UserError(f"no file {name}", hint="a RayJob manifest, a `ray up` YAML or a Slurm script")
    text = path.read_text(encoding="utf-8", errors="replace")
    from grid.launcher_scripts import cluster, slurm

    if text.startswith("#!") or "#SBATCH" in text:
        return slurm(text, name)
    for tree in _documents(text, name):
        if plain(tree, "kind") == "RayJob":
            return _rayjob(tree, text, name)
        if child(tree, "cluster_name") is not None:
            return cluster(tree, text, name)
    why = "no document of `kind: RayJob`, no `cluster_name`, no #SBATCH"
    raise UserError(f"{name} is no launcher", why=why, hint="see experiments/clusters", where=name)


def _documents(text: str, name: str) -> list[Node]:
    """The documents of a YAML file, each with the file's own line numbers."""
    lines = text.splitlines()
    cuts = [-1, *(i for i, line in enumerate(lines) if line.rstrip() == "---"), len(lines)]
    made = []
    for start, end in zip(cuts, cuts[1:]):
        if any(line.strip() and not line.strip().startswith("#") for line in lines[start + 1 : end]):
            made.append(yamlfile.parse("\n" * (start + 1) + "\n".join(lines[start + 1 : end]), name))
    return made


def child(node: Node | None, *path: str) -> Node | None:
    for key in path:
        if node is None or not isinstance(node.value, dict):
            return None
        node = node.value.get(key)
    return node


def plain(node: Node | None, *path: str, default: Any = None) -> Any:
    found = child(node, *path)
    return default if found is None or found.value is None else found.plain()


def items(node: Node | None, *path: str) -> list[Node]:
    found = child(node, *path)
    return found.value if found is not None and isinstance(found.value, list) else []


def quantity(value: Any) -> float:
    """A Kubernetes quantity of CPUs or devices: 4, "4", "500m"; 0 for what is none."""
    text = str(value or 0)
    try:
        return float(text[:-1]) / 1000 if text.endswith("m") else float(text)
    except ValueError:
        return 0.0


def _rayjob(tree: Node, text: str, name: str) -> Launch:
    wrong: list[UserError] = []
    spec = child(tree, "spec")
    where = spec.where if spec is not None else name

    def rule(kept: bool, what: str, why: str, hint: str, at: Node | None = None) -> None:
        if not kept:
            wrong.append(UserError(what, why=why, hint=hint, where=at.where if at is not None else where))

    rule(plain(tree, "apiVersion") == "ray.io/v1", "apiVersion is not ray.io/v1", "KubeRay 1.0 and newer", "apiVersion: ray.io/v1")
    again = "a second submission would be a second driver"
    hint = "submitterConfig: {backoffLimit: 0}"
    rule(plain(spec, "submitterConfig", "backoffLimit") == 0, "the submitter is tried again", again, hint, child(spec, "submitterConfig"))
    rule(plain(spec, "backoffLimit", default=0) == 0, "the job is tried again", again, "backoffLimit: 0", child(spec, "backoffLimit"))
    ends = plain(spec, "shutdownAfterJobFinishes") is True
    rule(ends, "the cluster stays when the study ends", "its GPUs would idle", "shutdownAfterJobFinishes: true")
    cluster = child(spec, "rayClusterSpec")
    groups = [_pods("the head", child(cluster, "headGroupSpec"), wrong, where, head=True)]
    for worker in items(cluster, "workerGroupSpecs"):
        groups.append(_pods(f"group {plain(worker, 'groupName', default='?')}", worker, wrong, where))
    rule(len(groups) > 1, "no workerGroupSpecs", "somebody has to compute", "a group with the GPUs")
    command, at = [], child(spec, "entrypoint")
    try:
        command = shlex.split(plain(spec, "entrypoint", default="") or "")
    except ValueError as error:
        rule(False, "entrypoint can't be read", str(error), "quote it as in a shell", at)
    asked = plain(cluster, "authOptions", "mode") == "token"
    own = all(g.environment.get("RAY_AUTH_MODE") == "token" and g.environment.get("RAY_AUTH_TOKEN") == "" for g in groups)
    return Launch(
        "RayJob", name, text, groups, command, at.where if at is not None else where, token=asked or own, sensible=wrong,
        token_hint="rayClusterSpec: authOptions: {mode: token}, or RAY_AUTH_MODE=token and RAY_AUTH_TOKEN from a secretKeyRef on every pod",
    )  # fmt: skip


def _pods(name: str, spec: Node | None, wrong: list[UserError], where: str, head: bool = False) -> Group:
    """The nodes of headGroupSpec or of one of workerGroupSpecs."""
    pod = child(spec, "template", "spec")
    containers = items(pod, "containers")
    container = containers[0] if containers else None
    at = container.where if container is not None else spec.where if spec is not None else where
    if container is None:
        wrong.append(UserError(f"{name} has no container", hint="give its template a container", where=at))
    limits, asked = plain(container, "resources", "limits", default={}), plain(container, "resources", "requests", default={})
    started = plain(spec, "rayStartParams", default={}) or {}
    nodes = 1 if head else int(quantity(plain(spec, "replicas", default=1)) * quantity(plain(spec, "numOfHosts", default=1)))
    group = Group(
        name, nodes, quantity(started.get("num-cpus", limits.get("cpu", asked.get("cpu")))),
        int(quantity(started.get("num-gpus", limits.get(GPU)))), at, head=head,
    )  # fmt: skip
    for entry in items(container, "env"):
        key, value = str(plain(entry, "name", default="")), plain(entry, "value")
        if value is not None and is_secret(key):
            hint = "valueFrom: {secretKeyRef: {name: ..., key: ...}}"
            wrong.append(
                UserError(f"a secret stands in the file: {key}", why="files like this are shared and kept", hint=hint, where=entry.where)
            )
        group.environment[key] = "" if value is None else str(value)
    shared = {str(plain(volume, "name")): _storage(volume) for volume in items(pod, "volumes")}
    for mount in items(container, "volumeMounts"):
        kind, path = shared.get(str(plain(mount, "name")), ""), plain(mount, "mountPath")
        if kind and path and not plain(mount, "readOnly"):
            inner = plain(mount, "subPath", default="")
            group.storage[str(path)] = f"{kind}/{inner}" if inner else kind
    return group


def _storage(volume: Node) -> str:
    """What a volume is, if several nodes can share it; '' for a node's own."""
    if claim := plain(volume, "persistentVolumeClaim", "claimName"):
        return "" if plain(volume, "persistentVolumeClaim", "readOnly") else f"claim {claim}"
    if server := plain(volume, "nfs", "server"):
        return f"nfs {server}:{plain(volume, 'nfs', 'path', default='')}"
    path = plain(volume, "hostPath", "path")
    return f"the hosts' {path}" if path else ""
