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
DECISIVE = ("circular", "split", "open", "pair", "most_images", "set", "part")
"""Keys of a source that decide what a benchmark's number means."""


class Implied(Node):
    """The name of a data set that nobody wrote: that of the benchmark's file."""


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
    own = {"data": Implied(benchmarks.stem(named.value), named.file, named.line), **entry.value}
    return merged(Node(below, found.file, found.line), Node(own, entry.file, entry.line))


def data_sets(profile: Profile, tree: Node, study: Node, reader: Reader) -> None:
    """Adds to the profile the data sets that its study's benchmarks name and only benchmark files have, and completes those of its own that
    change a file's. tree: the profile's own."""
    files: dict[str, str] = {}
    for entry in _entries(study):
        named, used = _text(entry, "data"), _text(entry, "use")
        if named is None:
            continue
        own = _own(tree, named.value)
        if own is not None and _whole(own):
            if used is not None and isinstance(named, Implied):
                _same_benchmark(own, named, used, reader)
            continue
        file = named.value
        if used is not None and (isinstance(named, Implied) or not _is_named(file)):
            file = used.value
        if not _is_named(file):
            continue  # the study's check tells
        other = files.setdefault(named.value, file)
        if other != file:
            what = f"two benchmarks read their rows from {named.value!r}, one by {other}, one by {file}"
            reader.errors.append(UserError(what, hint="data: ANOTHER_NAME beside one of them", where=named.where))
            continue
        _take(profile, named.value, file, own, named.where, reader)
    for name, own in _mappings(tree):
        if name in benchmarks.names() and name not in files and not _whole(own):
            _take(profile, name, name, own, own.where, reader)


def _take(profile: Profile, name: str, file: str, own: Node | None, where: str, reader: Reader) -> None:
    """The file's data set, with what the profile changes of it, as the profile's `name`."""
    found = _read(file, where, reader)
    if found is None:
        return
    below = Node({key: node for key, node in found.value.items() if key in _fields(Data)}, found.file, found.line)
    made = reader.read(Data, merged(below, own) if own is not None else below, f"data.{name}")
    if made is not None:
        profile.data[name] = made


def _same_benchmark(own: Node, named: Node, used: Node, reader: Reader) -> None:
    """A profile's data set of a benchmark file's name must ask what the file says; a miniature's stands in for it."""
    found = _read(used.value, named.where, reader)
    source = _text(own, "source")
    if found is None or source is None or source.value != found.value["source"].value:
        return
    said, meant = (keys if isinstance(keys := node.plain().get("keys"), dict) else {} for node in (own, found))
    changed = [f"{key}: {said.get(key)!r} instead of {meant.get(key)!r}" for key in DECISIVE if said.get(key) != meant.get(key)]
    if changed:
        what = f"the profile's data set {named.value!r} asks something else than {used.value} ({', '.join(changed)})"
        hint = f"data: {named.value}-as-published beside `use` for the file's own rows, or data: {named.value} for the profile's"
        reader.errors.append(UserError(what, hint=hint, where=named.where))


def _whole(data: Node) -> bool:
    return any(key in data.value for key in ORIGINS)


def _is_named(name: str) -> bool:
    return name in benchmarks.names() or benchmarks.is_file(name)


def _entries(study: Node) -> Iterator[Node]:
    entries = study.value.get("benchmarks")
    yield from (entry for entry in (entries.value.values() if entries and isinstance(entries.value, dict) else ()))


def _mappings(profile: Node) -> list[tuple[str, Node]]:
    """The profile's data sets, as far as they are mappings."""
    sets = profile.value.get("data")
    found = sets.value.items() if sets is not None and isinstance(sets.value, dict) else ()
    return [(name, own) for name, own in found if isinstance(own.value, dict)]


def _own(profile: Node, name: str) -> Node | None:
    return dict(_mappings(profile)).get(name)


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
