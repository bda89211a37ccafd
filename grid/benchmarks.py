"""Benchmark files under a study: what `use` and `data` name in experiments/benchmarks lies beneath what study and profile say themselves.

In: the trees of a study and of a profile. Out: the study with its benchmarks filled in, and the profile's data sets with those that only
benchmark files know. A study that names no file, under a profile that has its data sets, is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from datasets_ray import benchmarks
from datasets_ray.errors import UserError
from datasets_ray.schema import Reader, _fields
from datasets_ray.yamlfile import Node, merged
from grid.profile import Data, Profile
from grid.study import Benchmark

ORIGINS = ("source", "concat")
"""A data set of a profile that says one of these is whole; one that says neither changes a benchmark file's."""


def filled(study: Node, reader: Reader) -> Node:
    """The study's tree with each benchmark laid over the file that its `use` names. Mistakes go to the reader."""
    entries = study.value.get("benchmarks")
    if entries is None or not isinstance(entries.value, dict):
        return study
    made = {name: _over_its_file(entry, reader) for name, entry in entries.value.items()}
    if all(made[name] is entry for name, entry in entries.value.items()):
        return study
    return Node({**study.value, "benchmarks": Node(made, entries.file, entries.line)}, study.file, study.line)


def _over_its_file(entry: Node, reader: Reader) -> Node:
    named = _text(entry, "use")
    if named is None:
        return entry
    found = _read(named.value, named.where, reader)
    if found is None:
        return entry
    below = {key: node for key, node in found.value.items() if key in _fields(Benchmark)}
    own = {"data": Node(benchmarks.stem(named.value), named.file, named.line), **entry.value}
    return merged(Node(below, found.file, found.line), Node(own, entry.file, entry.line))


def data_sets(profile: Profile, tree: Node, study: Node, reader: Reader) -> None:
    """Adds to the profile the data sets that its study's benchmarks name and only benchmark files have. tree: the profile's own."""
    for entry in _entries(study):
        named, used = _text(entry, "data"), _text(entry, "use")
        if named is None:
            continue
        own = _own(tree, named.value)
        if own is not None and any(key in own.value for key in ORIGINS):
            continue
        file = used.value if used is not None and benchmarks.stem(used.value) == named.value else named.value
        if file not in benchmarks.names() and not benchmarks.is_file(file):
            continue  # the study's check tells
        found = _read(file, named.where, reader)
        if found is None:
            continue
        below = Node({key: node for key, node in found.value.items() if key in _fields(Data)}, found.file, found.line)
        made = reader.read(Data, merged(below, own) if own is not None else below, f"data.{named.value}")
        if made is not None:
            profile.data[named.value] = made


def _entries(study: Node) -> Iterator[Node]:
    entries = study.value.get("benchmarks")
    yield from (entry for entry in (entries.value.values() if entries and isinstance(entries.value, dict) else ()))


def _own(profile: Node, name: str) -> Node | None:
    """The profile's entry of this data set, if it is a mapping."""
    sets = profile.value.get("data")
    own = sets.value.get(name) if sets is not None and isinstance(sets.value, dict) else None
    return own if own is not None and isinstance(own.value, dict) else None


def _text(entry: Node, key: str) -> Node | None:
    """The key's node where it holds a text; other mistakes are the schema's to tell."""
    node = entry.value.get(key) if isinstance(entry.value, dict) else None
    return node if node is not None and isinstance(node.value, str) else None


def _read(name: str, where: str, reader: Reader) -> Node | None:
    """The file's whole tree, checked as such."""
    try:
        benchmarks.load(name, where)
        return benchmarks.tree(name, where)
    except UserError as error:
        reader.errors += getattr(error, "errors", [error])
        return None
