"""Where a part's weights come from, and how a trained part is kept.

    {"fresh": seed}                        initialised under that seed alone: other parts, their order and the process don't matter
    {"stage": id[, "part": name][, "of": checkpoint]}   `<part>.safetensors` of a train stage's artefact; of: what it was trained from, for
                                           a part whose architecture only its checkpoint knows
    {"checkpoint": dir-or-hub-id, "revision"}   a released model: safetensors first, pickles only as plain tensors (`weights_only`)

A released file holds more than the part and under other prefixes (`visual.`, `language_model.`); the part's own names are found inside.
A module that is called otherwise in other libraries has `released(index) -> index`, which adds its names (`clip_names`).
A name that is missing or a shape that differs is the user's error, with the tensor named. Tensors are copied one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets_ray.errors import UserError
from trainers.models import released
from trainers.models.released import Index, Tensors

HINTS = {
    "connector": "a connector fits the encoder and the language model that it was trained between: give one of this pair, or start fresh",
    "else": "compare the part's config",
}
"""What to do about weights that don't fit, by part."""


@dataclass(frozen=True)
class Source:
    """Everything that building a model reads: artefacts of earlier stages and the image recipe of this one."""

    inputs: Callable[[str], Path]
    image: dict[str, Any] | None = None
    """ImageRecipe, if known: the encoder normalises by its mean and std and checks that its size fits."""

    def released(self, part: dict[str, Any]) -> Path | None:
        """The directory of the checkpoint that a part started from, if it started from one."""
        weights = part["weights"].get("of", part["weights"])
        return released.directory(weights["checkpoint"], weights.get("revision")) if "checkpoint" in weights else None

    def config_of(self, part: dict[str, Any]) -> dict[str, Any]:
        """The released `config.json` behind a part that names only its checkpoint."""
        path = self.released(part)
        if path is None:
            raise UserError(f"a {part['builder']} without config", why="only a released checkpoint brings its own")
        return released.config(path)

    def config(self, part: dict[str, Any], own: Callable[[dict[str, Any]], dict[str, Any]], ours: tuple[str, ...] = ()) -> dict[str, Any]:
        """A part's whole config: what the spec says, or the checkpoint's `config.json` as `own` reads it where the spec says nothing of
        the architecture (keys in `ours` don't). UserError where the two contradict each other."""
        given = part["config"]
        path = self.released(part)
        if set(given) - set(ours):
            if path is not None and (path / "config.json").is_file():
                released.agree({k: v for k, v in given.items() if k not in ours}, own(released.config(path)), str(path / "config.json"))
            return given
        return {**own(self.config_of(part)), **given}


def make_part(name: str, part: dict[str, Any], source: Source, construct: Callable[[], nn.Module]) -> nn.Module:
    """Constructs a part and gives it its weights. The global random state is as it was afterwards."""
    weights = part["weights"]
    if "fresh" in weights:
        with _seeded(int(weights["fresh"])):
            return construct()
    from transformers.initialization import no_init_weights

    with _seeded(0), no_init_weights():
        module = construct()
    if "stage" in weights:
        file = source.inputs(weights["stage"]) / f"{weights.get('part', name)}.safetensors"
        if not file.is_file():
            raise UserError(f"stage {weights['stage']} left no {file.name}", why="it did not train that part")
        load_part(module, [file], str(file), hint=HINTS.get(name, HINTS["else"]))
    elif "checkpoint" in weights:
        path = released.directory(weights["checkpoint"], weights.get("revision"))
        files = _best(module, released.weight_files(path, name))
        load_part(module, files, weights["checkpoint"], renames=True, hint=HINTS.get(name, HINTS["else"]))
    else:
        raise UserError(f"weights of {name}: {weights}", hint="{fresh: seed}, {stage: id} or {checkpoint: directory or hub id}")
    return module


def load_part(module: nn.Module, files: list[Path], where: str, renames: bool = False, hint: str = HINTS["else"]) -> None:
    """Copies a part's tensors from files. Raises UserError naming every tensor that is missing or has another shape."""
    with Tensors() as tensors:
        found = _index(tensors, files, module, renames)
        wanted = _distinct(module)
        prefix = (_prefix(wanted, found) if renames else "") or ""
        optional: Callable[[str], bool] = getattr(module, "ignores", lambda key: False)
        problems: list[str] = []
        used: set[str] = set()
        pairs: list[tuple[str, Tensor]] = []
        for names, target in wanted:
            name = next((n for n in names if prefix + n in found), None)
            if name is None:
                problems.append(f"{names[0]} is missing")
                continue
            used.update(prefix + n for n in names)
            pairs.append((prefix + name, target))
        if not renames:  # our own file of this part: a tensor too many means that it belongs to another model
            problems += [f"{key} is not in this model" for key in found if key not in used and not optional(key)]
        for key, target in sorted(pairs, key=lambda pair: str(found[pair[0]].pieces[0][0])):  # a shard after the other
            tensor = tensors[found[key]]
            if tensor.numel() == target.numel() == 1:  # a scalar is stored as [] by some and as [1] by others
                tensor = tensor.reshape(target.shape)
            if tensor.shape != target.shape:
                said = f"{found[key].name} has shape {tuple(tensor.shape)}"
                problems.append(f"{said}, the model's config asks for {tuple(target.shape)}")
            else:
                with torch.no_grad():
                    target.copy_(tensor)
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"weights don't fit the model: {'; '.join(problems[:4])}{more}", where=where, hint=hint)


def save_part(model: Any, name: str, path: Path, state: dict[str, Tensor] | None = None) -> Path:
    """Writes part `name` of a model to the file `path` (safetensors, tied tensors once); returns it.

    state: the part's tensors if they live elsewhere than in the module (gathered shards, fp32 masters).
    """
    from safetensors.torch import save_file

    module = model.parts[name]
    state = module.state_dict() if state is None else state
    names = [aliases[0] for aliases, _ in _distinct(module)]
    missing = [n for n in names if n not in state]
    assert not missing, f"state of {name} lacks {missing[:3]}"
    tensors = {n: state[n].detach().to("cpu").contiguous().clone() for n in names}
    save_file(tensors, str(path), metadata={"format": "pt"})
    return Path(path)


def _distinct(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Each tensor of a module with all its names: tied embeddings have two."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(groups.values())


def _index(tensors: Tensors, files: list[Path], module: nn.Module, renames: bool) -> Index:
    """What the files hold, as this module calls it."""
    found = released.index(tensors, files, renames)
    convert: Callable[[Index], Index] | None = getattr(module, "released", None)
    return convert(found) if renames and convert is not None else found


def _best(module: nn.Module, candidates: list[list[Path]]) -> list[Path]:
    """The first format that holds the whole part, else the one that holds most of it. Later ones aren't opened once one does."""
    wanted = _distinct(module)
    most: tuple[int, list[Path]] = -1, []
    for files in candidates:
        with Tensors() as tensors:
            found = _index(tensors, files, module, renames=True)
            prefix = _prefix(wanted, found) or ""
            held = sum(any(prefix + n in found for n in names) for names, _ in wanted)
        if held > most[0]:
            most = held, files
        if held == len(wanted):
            break
    return most[1]


def _prefix(wanted: list[tuple[list[str], Tensor]], found: Index) -> str | None:
    """The prefix under which a file holds most of the wanted names; None if it is another model's file."""
    first = wanted[0][0][0]
    candidates = sorted({key.removesuffix(first) for key in found if key == first or key.endswith(f".{first}")})
    return max(candidates, key=lambda p: sum(any(p + n in found for n in names) for names, _ in wanted), default=None)


@contextmanager
def _seeded(seed: int) -> Generator[None, None, None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
