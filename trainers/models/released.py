"""A released checkpoint on disk: its directory, its configs, its weight files, its tensors by the names that parts use.

    directory("owner/name", revision) ──► Path          a hub snapshot or a local directory
    config(path)                      ──► dict          config.json
    weight_files(path, "llm")         ──► [[shards] ...]  one list per format, the preferred first
    with Tensors() as tensors:
        names = index(tensors, files) ──► {name: Stored}
        tensors[names["lm_head.weight"]]

Weights are read as safetensors, or as pickles of plain tensors (`weights_only`); no code of a checkpoint ever runs. Whatever is wrong with
a file (missing shard, cut off, a git-LFS pointer, a pickle with code in it) is one UserError that names the file.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets_ray.errors import UserError

FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors", "mm_projector.bin",
    "open_clip_pytorch_model.bin", "pytorch_model.bin",
)  # fmt: skip
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

LFS = b"version https://git-lfs"
"""How a file begins that git cloned without its contents."""


@dataclass(frozen=True)
class Stored:
    """A tensor as files hold it: pieces (file, name there) end to end along the first axis; of that a share, transposed, if asked for."""

    pieces: tuple[tuple[Path, str], ...]
    transposed: bool = False
    share: tuple[int, int] | None = None
    """(i, n): the i-th of n equal shares."""

    @property
    def name(self) -> str:
        return " + ".join(name for _, name in self.pieces)


Index = dict[str, Stored]
"""Tensor name, as parts call it → where it is."""


# ── directories and configs ──────────────────────────────────────────────────────────────────────────────────────────────────────


def directory(checkpoint: str, revision: str | None = None) -> Path:
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for anything else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} can't be read", why=str(error).splitlines()[0], hint="download it again", where=str(path)) from None
    if not isinstance(found, dict):
        raise UserError(f"{path.name} holds no object", why="a config is a set of keys", hint="download it again", where=str(path))
    return found


def config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint's directory."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json", hint="write the part's config into the profile")
    return read_json(path / "config.json")


def text_config(whole: dict[str, Any]) -> dict[str, Any]:
    """A language model's config: a causal LM's own, or the one inside a composite (Llava)."""
    inner = whole.get("text_config")
    if not isinstance(inner, dict):
        return whole
    tied = {} if "tie_word_embeddings" in inner else {"tie_word_embeddings": bool(whole.get("tie_word_embeddings", False))}
    return {"model_type": "llama", **tied, **inner}


def vision_config(whole: dict[str, Any]) -> dict[str, Any]:
    """A vision tower's config: its own, or the one inside a composite (CLIP, SigLIP, Llava, whose feature layer comes with it)."""
    inner = whole.get("vision_config")
    if not isinstance(inner, dict):
        return whole
    kind = "siglip_vision_model" if whole.get("model_type") == "siglip" else "clip_vision_model"
    made = {"model_type": kind, **inner}
    layer, strategy = whole.get("vision_feature_layer"), whole.get("vision_feature_select_strategy", "default")
    if layer is None:
        return made
    if not isinstance(layer, int) or (strategy == "full" and made["model_type"] == "clip_vision_model"):
        raise UserError(f"a model that reads layer {layer} of its encoder, {strategy}", why="one layer, patch tokens only are supported")
    return {**made, "layer": layer}


HARMLESS = frozenset({"architectures", "dtype", "initializer_range", "torch_dtype", "transformers_version", "use_cache", "_name_or_path"})
"""Config keys that change no number of a model with weights."""


def agree(given: dict[str, Any], released: dict[str, Any], where: str) -> None:
    """UserError if a config written in a profile contradicts the checkpoint's own: equal shapes don't prove equal models (heads, rotary
    base, activation)."""
    wrong = _apart(given, released)
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        what = f"the part's config contradicts the checkpoint's: {'; '.join(wrong[:4])}{more}"
        raise UserError(what, where=where, hint="leave the config out: it is read from the checkpoint")


def _apart(given: dict[str, Any], released: dict[str, Any], above: str = "") -> list[str]:
    """What both say, and differently."""
    wrong = []
    for key in (key for key in given if key in released and key not in HARMLESS):
        here, there = given[key], released[key]
        if isinstance(here, dict) and isinstance(there, dict):
            wrong += _apart(here, there, f"{above}{key}.")
        elif here != there:
            wrong.append(f"{above}{key} is {there!r} there, {here!r} here")
    return wrong


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def weight_files(path: Path, part: str) -> list[list[Path]]:
    """The weight files of a directory, shards together, the preferred first. A repository may hold one model in several formats."""
    found = []
    for name in (f"{part}.safetensors", *FILES):
        listing = path / f"{name}.index.json"
        if listing.is_file():
            shards = read_json(listing).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{listing.name} names no shards", why="no weight_map", hint="download it again", where=str(listing))
            names = sorted(set(map(str, shards.values())))
            outside = [s for s in names if Path(s).name != s]
            if outside:
                raise UserError(f"{listing} points outside its directory: {outside[0]}")
            found.append([path / s for s in names])
        elif (path / name).is_file():
            found.append([path / name])
    if not found:
        raise UserError(f"no weights in {path}", why=f"looked for {part}.safetensors, {', '.join(FILES)} and their shards")
    return found


class Tensors:
    """Open weight files; one tensor at a time is in memory. They stay mapped until the `with` ends."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._open: dict[Path, tuple[list[str], Callable[[str], Tensor]]] = {}

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.clear()
        self._stack.close()

    def names(self, file: Path) -> list[str]:
        return self._opened(file)[0]

    def __getitem__(self, stored: Stored) -> Tensor:
        pieces = [self._opened(file)[1](name) for file, name in stored.pieces]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if stored.share is not None:
            whole = whole.chunk(stored.share[1])[stored.share[0]]
        return whole.T if stored.transposed else whole

    def _opened(self, file: Path) -> tuple[list[str], Callable[[str], Tensor]]:
        if file not in self._open:
            _whole(file)
            if file.suffix == ".safetensors":
                from safetensors import SafetensorError, safe_open

                try:
                    handle = self._stack.enter_context(safe_open(str(file), framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise _unreadable(file, str(error)) from None
                self._open[file] = list(handle.keys()), handle.get_tensor
            else:
                tensors = _pickled(file)
                self._open[file] = list(tensors), tensors.__getitem__
        return self._open[file]


def index(tensors: Tensors, files: list[Path], rename: bool = True) -> Index:
    """What the files hold. rename: to the names that a composite's parts have on their own."""
    return {(_renamed(key) if rename else key): Stored(((file, key),)) for file in files for key in tensors.names(file)}


def _renamed(key: str) -> str:
    for pattern, replacement in RENAMES:
        key = pattern.sub(replacement, key)
    return key


def as_transformers(found: Index, *kinds: str) -> Index:
    """Today's names beside those of older checkpoints, of a transformers class and its model_type (GPT-NeoX: `embed_out` → `lm_head`)."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    steps = [step for kind in kinds for step in get_checkpoint_conversion_mapping(kind) or ()]
    made = dict(found)
    for step in steps:
        if isinstance(step, WeightRenaming) and not isinstance(step, PrefixChange):
            made |= {step.rename_source_key(key)[0]: stored for key, stored in made.items()}
    return made


def _whole(file: Path) -> None:
    """UserError for a file that isn't there or is a pointer to one that isn't."""
    where = str(file.parent)
    if not file.is_file():
        raise UserError(f"{file.name} is missing", why="the checkpoint's index names it", hint="download the checkpoint again", where=where)
    with file.open("rb") as opened:
        if opened.read(len(LFS)) == LFS:
            why, hint = "the repository was cloned without its large files", "git lfs pull"
            raise UserError(f"{file.name} is a git-LFS pointer and holds no weights", why=why, hint=hint, where=where)


def _unreadable(file: Path, reason: str) -> UserError:
    why = f"{file.stat().st_size} bytes, {(reason.strip() or 'no reason given').splitlines()[0]}"
    return UserError(f"{file.name} is damaged or cut off", why=why, hint="download it again", where=str(file.parent))


def _pickled(file: Path) -> dict[str, Tensor]:
    """A pickle's tensors. Nothing but tensors and plain containers is ever built from it."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        why = "it names code to run, or was never a checkpoint: only pickles of plain tensors are read"
        hint = "convert it to safetensors where you trust it"
        raise UserError(f"{file.name} is refused", why=why, hint=hint, where=str(file.parent)) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _unreadable(file, str(error)) from None
    held = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise UserError(f"{file.name} holds no named tensors", hint="a state dict saved with torch.save", where=str(file.parent))
    return held
