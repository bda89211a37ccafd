"""Where a part's weights come from, and how a trained part is kept.

    {"fresh": seed}                        initialised under that seed alone: other parts, their order and the process don't matter
    {"stage": id[, "part": name]}          `<part>.safetensors` of a train stage's artefact
    {"checkpoint": dir-or-hub-id, "revision"}   a released model: safetensors first, pickles only as plain tensors (`weights_only`)

A released file holds more than the part and under other prefixes (`visual.`, `language_model.`); the part's own names are found inside.
A name that is missing or a shape that differs is the user's error, with the tensor named. Tensors are copied one at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets_ray.errors import UserError

FILES = ("open_clip_model.safetensors", "model.safetensors", "mm_projector.bin", "open_clip_pytorch_model.bin", "pytorch_model.bin")
"""Weight files of released models, in the order in which they are preferred; `<part>.safetensors` comes before them."""

RENAMES = (
    (re.compile(r"(^|\.)language_model\.model\."), r"\1language_model."),
    (re.compile(r"^model\.(language_model|visual|vision_tower|multi_modal_projector)\."), r"\1."),
    (re.compile(r"^language_model\.(?!lm_head)"), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(model\.)?(vision_tower\.)+(vision_model\.)?"), "vision_model."),
    (re.compile(r"multi_modal_projector\.linear_1\."), "multi_modal_projector.0."),
    (re.compile(r"multi_modal_projector\.linear_2\."), "multi_modal_projector.2."),
)
"""Names of Hugging Face composites (Llava, Qwen2-VL; transformers 4 and 5) → the names their parts have on their own."""


@dataclass(frozen=True)
class Source:
    """Everything that building a model reads: artefacts of earlier stages and the image recipe of this one."""

    inputs: Callable[[str], Path]
    image: dict[str, Any] | None = None
    """ImageRecipe, if known: the encoder normalises by its mean and std and checks that its size fits."""

    def config_of(self, part: dict[str, Any]) -> dict[str, Any]:
        """The released `config.json` behind a part that names only its checkpoint."""
        weights = part["weights"]
        if "checkpoint" not in weights:
            raise UserError(f"a {part['builder']} without config", why="only a released checkpoint brings its own")
        path = _directory(weights["checkpoint"], weights.get("revision")) / "config.json"
        if not path.is_file():
            raise UserError(f"{weights['checkpoint']} has no config.json", hint="write the part's config into the profile")
        return json.loads(path.read_text())


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
        load_part(module, [file], str(file))
    elif "checkpoint" in weights:
        directory = _directory(weights["checkpoint"], weights.get("revision"))
        candidates = _weight_files(directory, name)
        fitting = [files for files in candidates if _prefix(_distinct(module), _index(files, renames=True)) is not None]
        load_part(module, (fitting or candidates)[0], weights["checkpoint"], renames=True)
    else:
        raise UserError(f"weights of {name}: {weights}", hint="{fresh: seed}, {stage: id} or {checkpoint: directory or hub id}")
    return module


def load_part(module: nn.Module, files: list[Path], where: str, renames: bool = False) -> None:
    """Copies a part's tensors from files. Raises UserError naming every tensor that is missing or has another shape."""
    found = _index(files, renames)
    wanted = _distinct(module)
    prefix = (_prefix(wanted, found) if renames else "") or ""
    optional: Callable[[str], bool] = getattr(module, "ignores", lambda key: False)
    problems: list[str] = []
    taken: dict[Path, list[tuple[str, Tensor]]] = {}
    used: set[str] = set()
    for names, target in wanted:
        name = next((n for n in names if prefix + n in found), None)
        if name is None:
            problems.append(f"{names[0]} is missing")
            continue
        used.update(prefix + n for n in names)
        file, key = found[prefix + name]
        taken.setdefault(file, []).append((key, target))
    if not renames:  # our own file of this part: a tensor too many means that it belongs to another model
        problems += [f"{key} is not in this model" for key in found if key not in used and not optional(key)]
    for file, pairs in taken.items():
        with _reader(file) as read:
            for key, target in pairs:
                tensor = read(key)
                if tensor.numel() == target.numel() == 1:  # a scalar is stored as [] by some and as [1] by others
                    tensor = tensor.reshape(target.shape)
                if tensor.shape != target.shape:
                    problems.append(f"{key} has shape {tuple(tensor.shape)}, the model's config asks for {tuple(target.shape)}")
                else:
                    with torch.no_grad():
                        target.copy_(tensor)
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"weights don't fit the model: {'; '.join(problems[:4])}{more}", where=where, hint="compare the part's config")


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


def _index(files: list[Path], renames: bool) -> dict[str, tuple[Path, str]]:
    """Tensor name, as parts call it → (file, name in the file)."""
    return {(_renamed(key) if renames else key): (file, key) for file in files for key in _keys(file)}


def _prefix(wanted: list[tuple[list[str], Tensor]], found: dict[str, tuple[Path, str]]) -> str | None:
    """The prefix under which a file holds most of the wanted names; None if it is another model's file."""
    first = wanted[0][0][0]
    candidates = sorted({key.removesuffix(first) for key in found if key == first or key.endswith(f".{first}")})
    return max(candidates, key=lambda p: sum(any(p + n in found for n in names) for names, _ in wanted), default=None)


def _renamed(key: str) -> str:
    for pattern, replacement in RENAMES:
        key = pattern.sub(replacement, key)
    return key


@contextmanager
def _seeded(seed: int) -> Generator[None, None, None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _directory(checkpoint: str, revision: str | None) -> Path:
    """A local directory, or the snapshot of a hub repository (cached by huggingface_hub)."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
        raise UserError(f"no directory {checkpoint!r}", why="not a hub id either", hint="a local directory or owner/name")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "open_clip_pytorch_model.bin"]
    try:
        path = Path(snapshot_download(checkpoint, revision=revision, allow_patterns=wanted))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(checkpoint, revision=revision, allow_patterns=["*.json", "*.bin"]))
    except Exception as error:  # the hub client has a dozen exceptions for "not there" and "no network"
        raise UserError(f"can't get {checkpoint} from the hub", why=str(error).splitlines()[0], hint="give a local directory") from error
    return path


def _weight_files(directory: Path, part: str) -> list[list[Path]]:
    """The weight files of a directory, shards together, the preferred first. A repository may hold one model in several formats."""
    found = []
    for name in (f"{part}.safetensors", *FILES):
        index = directory / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            outside = [s for s in shards if Path(s).name != s]
            if outside:
                raise UserError(f"{index} points outside its directory: {outside[0]}")
            found.append([directory / s for s in shards])
        elif (directory / name).is_file():
            found.append([directory / name])
    if not found:
        raise UserError(f"no weights in {directory}", why=f"looked for {part}.safetensors, {', '.join(FILES)} and their shards")
    return found


def _keys(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(file), framework="pt") as opened:
            return list(opened.keys())
    return list(_pickled(file))


def _pickled(file: Path) -> dict[str, Tensor]:
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return loaded.get("state_dict", loaded)


@contextmanager
def _reader(file: Path) -> Generator[Callable[[str], Tensor], None, None]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(file), framework="pt") as opened:
            yield opened.get_tensor
    else:
        yield _pickled(file).__getitem__
