"""The user's files: found below the data root by what a spec names, and told apart from what often lies in their place.

In: a source's spec and the folder of the user's datasets. Out: paths inside that folder, or a UserError that says what to write instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from datasets_ray.errors import UserError, nearest

HEAD = 512
"""Bytes that `stand_in` looks at."""
SHOWN = 3


def stand_in(head: bytes) -> str:
    """What a file that begins like this is instead of the data that its name promises; empty when it may be the data."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-LFS pointer"
    if b"/annex/objects/" in head[:HEAD] and head.isascii():
        return "a git-annex pointer"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:32].lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<script")):
        return "a web page"
    return ""


def must_be_data(path: Path) -> None:
    """UserError when a list, a Parquet file or an archive is empty or only stands for itself."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise UserError(f"{path} can't be read", why=error.strerror or str(error)) from None
    if not head:
        raise UserError(f"{path} is empty", hint="download it again")
    if what := stand_in(head):
        way = {"a git-LFS pointer": "git lfs pull", "a git-annex pointer": "git annex get"}.get(what, "download it again")
        raise UserError(f"{path} is {what}, not the file itself", hint=way)


def json_object(path: Path, hint: str = "download or write it again") -> dict[str, Any]:
    """The object in a JSON file. UserError for one that is missing, torn or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path.name} can't be read", why=why, hint=hint, where=str(path)) from None
    if not isinstance(found, dict):
        raise UserError(f"{path.name} holds no object", why="keys with values are expected", hint=hint, where=str(path))
    return found


def given_object(given: str, flag: str) -> dict[str, Any]:
    """What a flag is given as JSON, or as a file that holds it."""
    if not given.lstrip().startswith("{"):
        return json_object(Path(given), f"{flag} '{{...}}' or a file")
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} is no JSON", why=str(error), hint=f"{flag} '{{\"key\": value}}', or a file") from None


def check_keys(spec: Mapping[str, Any], known: Sequence[str]) -> None:
    """UserError for a key that the source doesn't have, and for impossible `rows`."""
    for key in spec:
        if key not in ("source", *known):
            raise UserError(f"source {spec['source']!r} has no key {key!r}", hint=nearest(key, known))
    rows = spec.get("rows")
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
        raise UserError(f"rows: {rows!r}", why="a positive whole number, or leave it out for all")


def one_of(spec: Mapping[str, Any], key: str, choices: Sequence[str]) -> str:
    """The value of a key with a fixed set of values; the first is the default."""
    value = spec.get(key, choices[0])
    if value not in choices:
        raise UserError(f"source {spec['source']!r} has no {key} {value!r}", hint=nearest(str(value), choices))
    return value


def below(spec: Mapping[str, Any], key: str, data_root: str | None, usual: Sequence[str] = (), *, folder: bool = False) -> Path:
    """The file (or folder) that `spec[key]` names below the data root; without the key the first of the `usual` names that exists."""
    base, source = _base(spec, data_root), spec["source"]
    given = spec.get(key)
    names = [given] if given is not None else list(usual)
    kind = "folder" if folder else "file"
    if not names:
        raise UserError(f"source {source!r} needs the key {key!r}", why=f"a {kind} below {base}", hint=f"{key}: PATH")
    for name in names:
        path = _inside(base, name, key)
        if path.is_dir() if folder else path.is_file():
            return path
    raise UserError(
        f"no {kind} for {key!r} of source {source!r} in {base}", why=f"looked for {', '.join(map(str, names))}",
        hint=f"put it there or name it: {key}: PATH",
    )  # fmt: skip


def matching(
    spec: Mapping[str, Any], key: str, data_root: str | None, suffixes: Sequence[str], usual: Sequence[str] = ()
) -> list[Path]:  # fmt: skip
    """All files that `spec[key]` (a file, a folder, a pattern with `*`, or a list of those) names below the data root, sorted by path.

    suffixes: what counts in a folder. A name that matches nothing is an error: a missing shard must not go unnoticed.
    """
    base, source = _base(spec, data_root), spec["source"]
    given = spec.get(key)
    if given is None:
        found = next((some for name in usual if (some := _named(base, name, key, suffixes))), [])
        if not found:
            looked = f"looked for {', '.join(usual)}" if usual else f"below {base}"
            raise UserError(f"no files for source {source!r} in {base}", why=looked, hint=f"name them: {key}: PATTERN")
        return found
    files: list[Path] = []
    for name in [given] if isinstance(given, str) else list(given):
        some = _named(base, name, key, suffixes)
        if not some:
            hint = f"files of source {source!r} end in {suffixes[0]}"
            raise UserError(f"no file matches {key}: {name}", why=f"looked in {base}", hint=hint)
        files += some
    return list(dict.fromkeys(files))


def _base(spec: Mapping[str, Any], data_root: str | None) -> Path:
    if not data_root:
        hint = "--set data_root=DIR, or set FINEGRID_DATA"
        raise UserError(f"source {spec['source']!r} needs the folder of your datasets", hint=hint)
    return Path(data_root)


def _inside(base: Path, name: Any, key: str) -> Path:
    if not isinstance(name, str) or not name:
        raise UserError(f"{key}: {name!r}", why=f"a path below {base}")
    path = base / name
    if not path.resolve().is_relative_to(base.resolve()):
        raise UserError(f"{key}: {name} leads out of the data root", why=f"datasets lie below {base}")
    return path


def _named(base: Path, name: Any, key: str, suffixes: Sequence[str]) -> list[Path]:
    if isinstance(name, str) and any(mark in name for mark in "*?["):
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise UserError(f"{key}: {name} leads out of the data root", why=f"datasets lie below {base}")
        found = [path for path in base.glob(name) if path.is_file()]
    else:
        path = _inside(base, name, key)
        found = [path] if path.is_file() else [p for p in path.glob("*") if p.suffix in suffixes] if path.is_dir() else []
    for path in found:
        _inside(base, str(path.relative_to(base)), key)
    return sorted(found)


def listed(paths: Sequence[Path]) -> str:
    """A few file names and how many more there are."""
    names = ", ".join(path.name for path in paths[:SHOWN])
    return names if len(paths) <= SHOWN else f"{names} and {len(paths) - SHOWN} more"
