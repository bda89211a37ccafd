"""Reads launchers written as commands: a cluster of machines behind SSH (`ray up`), and a Slurm script with `ray symmetric-run`.

In: the text of such a file. Out: `grid.launchers.Launch`. Of a shell text only plain assignments are followed; nothing is run. A folder
counts as shared where every node tests for it (`test -w DIR`): these files mount nothing themselves.
"""

from __future__ import annotations

import re
import shlex

from datasets_ray.errors import UserError
from datasets_ray.yamlfile import Node
from grid.launcher_files import child, items, plain, quantity
from grid.launchers import Group, Launch

TESTED = re.compile(r"\btest -w\s+(\S+)|\[\s+-w\s+(\S+)\s+\]")
"""How a file says that a folder must be there and writable."""
VARIABLE = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?")


def _assigned(text: str) -> dict[str, str]:
    """Plain assignments of a shell text, exported or not, with $NAME of earlier ones filled in."""
    known: dict[str, str] = {}
    for words in _lines(text):
        for word in words[1:] if words and words[0] == "export" else words:
            name, equals, value = word.partition("=")
            if not (equals and name.isidentifier()):
                break
            known[name] = _filled(value, known)
    return known


def _lines(text: str) -> list[list[str]]:
    """Commands of a shell text as words: lines joined at backslashes, cut at `;`, comments left out; what can't be read is left out."""
    made = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
            lexer.whitespace_split, lexer.commenters = True, "#"
            words = list(lexer)
        except ValueError:
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if word and not word.strip(";&|"):
                made.append(command)
                command = []
            else:
                command.append(word)
    return [command for command in made if command]


def _filled(text: str, known: dict[str, str]) -> str:
    return VARIABLE.sub(lambda match: known.get(match[1], match[0]), text)


def _tested(text: str, known: dict[str, str]) -> dict[str, str]:
    """Folders that the text tests for writing: shared, since each node goes through it."""
    found = [(match[1] or match[2]).strip("\"'") for match in TESTED.finditer(text)]
    return {_filled(path, known): "a folder that every node tests for" for path in found}


def _token_path(known: dict[str, str]) -> bool:
    return known.get("RAY_AUTH_MODE") == "token" and bool(known.get("RAY_AUTH_TOKEN_PATH") or known.get("RAY_AUTH_TOKEN"))


def _option(words: list[str], *names: str) -> str | None:
    """The value of `--name=value` or `--name value`."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else words[place + 1] if place + 1 < len(words) else None
    return None


def _count(text: str | None) -> int:
    """`4`, `gpu:4`, `gpu:a100:4` → 4."""
    last = (text or "").rpartition(":")[2]
    return int(last) if last.isdigit() else 0


def cluster(tree: Node, text: str, name: str) -> Launch:
    wrong: list[UserError] = []
    if plain(tree, "provider", "type") != "local":
        kind = plain(tree, "provider", "type")
        why = "only machines that you name (`type: local`) are read here"
        wrong.append(UserError(f"provider {kind!r}", why=why, hint="check that cluster with RAY_ADDRESS once it runs", where=name))
    tested = "\n".join(plain(tree, "initialization_commands", default=[]) + plain(tree, "setup_commands", default=[]))
    sizes = {"head": 1, "worker": len(items(tree, "provider", "worker_ips"))}
    groups, tokens = [], []
    for role, nodes in sizes.items():
        key = f"{role}_start_ray_commands"
        commands = plain(tree, key, default=[])
        known, at = _assigned("\n".join(commands)), child(tree, key)
        start = next((words for words in _lines("\n".join(commands)) if words[:2] == ["ray", "start"]), [])
        where = at.where if at is not None else name
        if not start and nodes:
            wrong.append(
                UserError(f"{key}: no `ray start`", why="the node would not join", hint=f"{key}: [ray stop, ray start ...]", where=where)
            )
        tokens.append(_token_path(known) or not nodes)
        if role == "head" and _option(start, "--dashboard-host") not in (None, "127.0.0.1", "localhost"):
            why = "the dashboard runs jobs for whoever reaches it"
            wrong.append(
                UserError("the dashboard listens to everyone", why=why, hint="--dashboard-host=127.0.0.1 and a tunnel", where=where)
            )
        group = Group(
            f"the {role}{'s' * (role == 'worker')}",
            nodes,
            quantity(_option(start, "--num-cpus")),
            _count(_option(start, "--num-gpus")),
            where,
        )
        group.environment, group.storage, group.head = known, _tested(tested, known), role == "head"
        groups.append(group)
    carried = any("auth_token" in str(source) for source in (plain(tree, "file_mounts", default={}) or {}).values())
    return Launch(
        "Ray cluster", name, text, groups, None, token=all(tokens) and carried, sensible=wrong,
        token_hint="file_mounts of ~/.ray/auth_token, and export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=... before each `ray start`",
    )  # fmt: skip


def slurm(text: str, name: str) -> Launch:
    wrong: list[UserError] = []
    asked = [word for line in text.splitlines() if line.startswith("#SBATCH") for word in line.split("#SBATCH", 1)[1].split()]
    script = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    known, commands = _assigned(script), _lines(script)
    run = next((words for words in commands if "symmetric-run" in words), None)
    number = next((i for i, line in enumerate(text.splitlines(), 1) if "symmetric-run" in line and not line.startswith("#")), 1)
    where = f"{name}:{number}"

    def rule(kept: bool, what: str, why: str, hint: str) -> None:
        if not kept:
            wrong.append(UserError(what, why=why, hint=hint, where=where))

    nodes = _count(_option(asked, "--nodes", "-N")) or 1
    command: list[str] = []
    if run is None:
        rule(
            False,
            "no `ray symmetric-run`",
            "it starts Ray on every node and the study on the first",
            "srun ray symmetric-run ... -- python -m grid.run ...",
        )
    else:
        split = run.index("--") if "--" in run else len(run)
        options, command = run[:split], [_filled(word, known) for word in run[split + 1 :]]
        rule(
            "--" in run,
            "no `--` before the study's command",
            "what stands before it is Ray's",
            "ray symmetric-run ... -- python -m grid.run ...",
        )
        for forbidden in ("--head", "--port", "--block", "--node-ip-address"):
            rule(
                not any(w.split("=")[0] == forbidden for w in options),
                f"{forbidden} for symmetric-run",
                "it sets that itself",
                f"leave {forbidden} out",
            )
        least = _filled(_option(options, "--min-nodes") or "", {**known, "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_NNODES": str(nodes)})
        rule(least == str(nodes), f"--min-nodes is {least or 'absent'}", f"the job has {nodes} nodes", '--min-nodes "$SLURM_JOB_NUM_NODES"')
        tasks = _option(options, "--ntasks-per-node") or _option(asked, "--ntasks-per-node")
        rule(tasks == "1", "not one task a node", "each would start Ray on the same node", "srun --ntasks-per-node=1")
        rule(
            any(word.startswith("RAY_ADDRESS=") for word in command) or "RAY_ADDRESS" in known,
            "no RAY_ADDRESS",
            "the study would start a Ray of its own",
            'env RAY_ADDRESS="$ADDRESS" python -m grid.run ...',
        )
    gpus = _count(_option(asked, "--gpus-per-node") or _option(asked, "--gres"))
    started = _count(_option(run or [], "--num-gpus")) if _option(run or [], "--num-gpus") else gpus
    rule(started == gpus, f"Ray counts {started} GPUs a node, Slurm gives {gpus}", "they are the same devices", f"--num-gpus={gpus}")
    cpus = quantity(_option(run or [], "--num-cpus") or _option(asked, "--cpus-per-task", "-c"))
    group = Group("the nodes", nodes, cpus, gpus, where, known, _tested(script, known), head=True)
    return Launch(
        "Slurm job", name, text, [group], command, where, token=_token_path(known), sensible=wrong,
        token_hint="export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token",
    )  # fmt: skip
