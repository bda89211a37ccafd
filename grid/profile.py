"""The scale a study runs at: what its names mean (assets), what there is to compute with (resources), what is smaller (overrides).

An asset is a checkpoint (`checkpoint:`, `revision:`) or a small model (`config:`) that becomes training stages (`trained:`),
run once on first use and kept by identity. A profile is `experiments/profiles/NAME.yaml` or any file; it may be a few changes of
another one, its `base`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets_ray import yamlfile
from datasets_ray.errors import UserError, nearest
from datasets_ray.schema import option
from datasets_ray.yamlfile import Node
from grid.recipe import SEEDS, Training, _name
from trainers import switches

SWITCHES = (*switches.SWITCHES, switches.ALL)
HERE = Path(__file__).resolve().parent.parent / "experiments" / "profiles"
DEFAULT = "tiny"
ROWS = 10**12
"""More than any data set has."""


CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""(mean, standard deviation) of the channels that encoders of each kind were trained with; IMAGENET: DINOv2."""


def _switches(names: list[str]) -> str | None:
    return next((f"no optimisation {n!r}; {nearest(n, SWITCHES)}" for n in names if n not in SWITCHES), None)


def _place(name: str) -> str | None:
    """Of a checkpoint: a path or an id that could be."""
    return None if name.strip() and name.isprintable() and len(name) < 1024 else "no directory and no hub id"


def _three(values: list[float]) -> str | None:
    return None if len(values) == 3 else f"{len(values)} numbers, one per colour channel expected"


def _spread(values: list[float]) -> str | None:
    return _three(values) or (None if min(values) > 0 else f"{min(values)} can't be: pixels are divided by it")


@dataclass
class Image:
    """How pixels reach an encoder (datasets_ray.images)."""

    kind: Literal["square", "native"] = option("one square per image, or the image's own size in patches", "square")
    size: int | None = option("side of the square", None, unit="pixels", low=1, high=8192)
    patch: int = option("side of a patch", unit="pixels", low=1, high=512)
    merge: int | None = option("native: patches per side that become one token", None, low=1, high=16)
    min_pixels: int | None = option("native: smallest area", None, unit="pixels", low=1)
    max_pixels: int | None = option("native: largest area", None, unit="pixels", low=1)
    mean: list[float] | None = option(
        "of the channels, 0-1; null: as a local checkpoint's files, its kind or its hub name say (0.5 for SigLIP, ImageNet's for DINOv2), "
        "else CLIP's, which is then listed as an assumption",
        None,
        check=_three,
    )
    std: list[float] | None = option("of the channels, above 0; null: as `mean`", None, check=_spread)


@dataclass
class Asset:
    """What every model asset may say about its weights."""

    config: dict[str, Any] | None = option("architecture: a tiny model's, or `{name: ...}` of a library's", None)
    checkpoint: str | None = option("directory or hub id of released weights", None, check=_place)
    revision: str | None = option("revision of the checkpoint", None)
    shape: dict[str, Any] | None = option("architecture numbers of a checkpoint, for the cost estimate only", None)
    trained: list[Training] = option("training stages, one after another, that make the weights", [])
    seed: int = option("of fresh weights", 0, low=0, high=SEEDS)


@dataclass
class Encoder(Asset):
    """A vision encoder. Of an open_clip model (or a CLIP or SigLIP from transformers) both towers mine and classify, too."""

    image: Image = option("pixels in")
    builder: Literal["open_clip", "transformers_vision"] = option(
        "who builds it: open_clip (CLIPs with a plain ViT, open_clip's or transformers'; no ResNet, nothing over timm), or "
        "transformers_vision (CLIP, SigLIP, SigLIP 2 but NaFlex, DINOv2)",
        "open_clip",
    )


@dataclass
class Llm(Asset):
    """A causal language model."""

    tokenizer: str | None = option(
        "committed tokenizer, directory, hub id or `id@revision`; null: the one of `initial`, else the checkpoint's",
        None,
    )
    initial: str | None = option("language model of this profile whose weights `trained` starts from", None)


@dataclass
class Model(Asset):
    """A whole vision-language architecture with its own weights, or a released model."""

    family: Literal["vlm", "qwen2_vl", "existing"] = option(
        "architecture; existing: any released model, asked through its own processor and transformers' generate", "vlm"
    )
    prompts: str | None = option("existing: how its family is asked (trainers/families)", None)
    remote_code: bool = option("existing: run the checkpoint's own code, with a pinned revision", False)
    image: Image | None = option("pixels in; null for `vlm`: its encoder's", None)
    tokenizer: str | None = option("committed tokenizer, directory, hub id or `id@revision`; null: the checkpoint's", None)
    template: str | None = option("conversation template; null: the language model's", None)
    initial: str | None = option("model of this profile whose weights `trained` starts from", None)
    stand_in: dict[str, Node] | None = option(
        "recipe keys of a model trained here in a released one's place, beside its reference's axes", None
    )


@dataclass
class Bridge:
    """A released connector."""

    checkpoint: str | None = option("directory or hub id", None, check=_place)
    revision: str | None = option("revision of the checkpoint", None)
    of: str | None = option("model of this profile with `stand_in`, whose pretraining makes the connector", None)


@dataclass
class Data:
    """A data set: a source's rows, or several sets as one."""

    source: str | None = option("reader in datasets_ray.sources", None)
    keys: dict[str, Any] = option("the source's own keys: part, split, rows, seed ...", {})
    revision: str | None = option("which version of the data", None)
    concat: list[str] = option("data sets of this profile, one after another", [])
    rows: int | None = option(
        "rows, where neither `keys` nor `expect` says how many: for batch arithmetic only", None, unit="rows", low=1, high=ROWS
    )
    expect: int | None = option(
        "records of the published release; fewer are an error without `allow_subset`", None, unit="records", low=1, high=ROWS
    )
    allow_subset: bool | None = option("whether fewer records than published will do; null: as the profile says", None)
    tokens: float = option("mean text tokens of a row, for the cost estimate only", 32.0, unit="tokens", above=0.0)
    images: float = option("mean images of a row, for the cost estimate only", 1.0, unit="images", low=0.0)
    megabytes: float = option("size of a thousand rows, for the disk estimate only", 5.0, unit="MB", low=0.0)


@dataclass
class Device:
    """One accelerator (or core) of the profile, for estimates only."""

    name: str = option("A100-40GB, A100-80GB, H100-80GB, H200, one CPU core: those need no numbers; or any other", "one CPU core")
    tflops: float | None = option("peak rate at the profile's precision; null: its name's", None, unit="TFLOP/s", above=0.0)
    mfu: float = option("assumed share of the peak that training reaches", 0.3, above=0.0, high=1.0)
    memory_gib: float | None = option("its memory; null: its name's", None, unit="GiB", above=0.0)
    host_gib: float | None = option("its share of the host's memory, for offloading; null: its name's", None, unit="GiB", low=0.0)


@dataclass
class Resources:
    """What a run may use. Nothing here changes a result beyond rounding."""

    lanes: int = option("worker groups side by side; 0: as many as the machine carries", 0, low=0)
    workers: int = option("workers of a lane: the world size of collective stages", 1, low=1)
    gpus_per_worker: int = option("accelerators of a worker", 0, low=0)
    cpus: int | None = option("cores given to Ray on this machine; null: all. One is always left to Ray Data", None, low=1)
    device: Literal["cpu", "cuda"] = option("what stages compute on", "cpu")
    threads: int = option("threads of the math libraries in a worker; 0: a fair share", 0, low=0)
    object_store_mb: int = option("cap of Ray's object store", 400, unit="MB", low=80)
    cache_mb: int = option("models and decoded images that a worker keeps from stage to stage", 512, unit="MB", low=0)
    pixels_mb: int = option("decoded images kept on each machine's own disk for all arms and runs; 0: none", 4096, unit="MB", low=0)
    features_mb: int = option(
        "outputs of frozen encoders kept on each machine's own disk, for the stages for which `grid.plan` says that it pays; 0: none",
        0,
        unit="MB",
        low=0,
    )
    attempts: int = option("attempts at a stage before its arms fail", 5, low=1)
    trials: int = option("Tune trials alive at once; each only waits", 2, low=1)
    collective_seconds: float = option("longest wait of ranks for each other inside a stage", 1800.0, unit="seconds", above=0.0)
    grace_seconds: float = option("longest wait for stages to save when a run is stopped", 30.0, unit="seconds", low=0.0)
    budget_seconds: float | None = option("what the run should take; printed against what it took", None, unit="seconds", above=0.0)
    dashboard: bool = option("whether Ray's dashboard starts", True)
    micro_tokens: Literal["auto"] | int = option(
        "tokens of one micro-batch; auto: the largest power of two that fits, a whole sample at least", 8192, unit="tokens", low=16
    )
    checkpoint_steps: int = option("steps between two checkpoints", 50, unit="steps", low=1)
    eval_batch: int = option("questions of one batch", 64, unit="questions", low=1)
    zero: Literal["auto", 0, 1, 2, 3] = option("DeepSpeed ZeRO stage; auto: the least that fits", "auto")
    activation_checkpointing: Literal["auto", True, False] = option(
        "recompute activations in the backward pass; auto: where memory asks for it", "auto"
    )
    offload: Literal["auto", True, False] = option(
        "masters, moments and the optimiser's step in the host's memory (ZeRO 2 and 3); auto: where nothing else fits", "auto"
    )
    disable: list[str] = option(
        f"optimisations to do without, to see that results stay as they are: {', '.join(SWITCHES)}", [], check=_switches
    )


@dataclass
class Tracking:
    """Where metrics go besides the run directory."""

    uri: str | None = option("MLflow server; null: SQLite in the run directory", None)


@dataclass
class Profile:
    """One YAML file under experiments/profiles, over the one that its `base: NAME|FILE` names, if it names one."""

    profile: str = option("its name", check=_name)
    about: str = option("what it is for, in a sentence")
    miniature: bool = option("whether every table must say so", False)
    allow_subset: bool = option("whether data sets may be smaller than published; every table says so", False)
    batch_scale: float = option(
        "factor of every training stage's batch, which keeps one sample or more; every table says so", 1.0, above=0.0, high=1.0
    )
    hollow: bool = option("build every arm at its true size without a device and without weights, instead of running it", False)
    precision: Literal["fp32", "bf16"] = option("of training and prediction", "fp32")
    device: Device = option("for estimates", Device)
    resources: Resources = option("for runs", Resources)
    data_root: str | None = option("folder of the user's data sets; null: FINEGRID_DATA", None)
    store: str | None = option("folder of finished stages; null: FINEGRID_STORE, else inside the run", None)
    tracking: Tracking = option("for metrics", Tracking)
    encoders: dict[str, Encoder] = option("name → CLIP model", {})
    llms: dict[str, Llm] = option("name → language model", {})
    models: dict[str, Model] = option("name → whole or released model", {})
    connectors: dict[str, Bridge] = option("name → released connector", {})
    data: dict[str, Data] = option("name → data set", {})
    overrides: dict[str, Node] | None = option("study keys that are different at this scale", None)


def choose(name: str | None) -> tuple[Path, str]:
    """(file, why) of the profile asked for: the argument, else FINEGRID_PROFILE, else tiny."""
    if name == "":
        raise UserError("--profile is empty", why="a shell variable that isn't set?", hint=f"--profile {DEFAULT}, or no --profile at all")
    wanted, why = (name, "--profile") if name else (os.environ.get("FINEGRID_PROFILE"), "FINEGRID_PROFILE")
    if not wanted:
        wanted, why = DEFAULT, "the default; --profile or FINEGRID_PROFILE chooses another"
    path = Path(wanted)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path, why
    path = HERE / f"{wanted}.yaml"
    if not yamlfile.is_file(path):
        raise UserError(f"no profile {wanted!r}", why=f"asked for by {why}", hint=nearest(wanted, [p.stem for p in HERE.glob("*.yaml")]))
    return path, why


def tree_of(path: Path, open_: tuple[Path, ...] = ()) -> Node:
    """A profile file's keys over those of its `base`, and that one's over its own. Raises UserError for a base that isn't there."""
    tree = yamlfile.read(path)
    named = tree.value.get("base")
    if named is None:
        return tree
    name = named.value
    if not isinstance(name, str):
        raise UserError("base is no text", why="it names another profile", hint="base: cluster", where=named.where)
    below = Path(name)
    if below.suffix in (".yaml", ".yml") or len(below.parts) > 1:
        below = path.parent / below
    else:
        below = HERE / f"{name}.yaml"
        if not yamlfile.is_file(below):
            raise UserError(f"base: no profile {name!r}", hint=nearest(name, [p.stem for p in HERE.glob("*.yaml")]), where=named.where)
    opened = (*open_, path.resolve())
    if below.resolve() in opened:
        raise UserError(f"base: {name!r} leads back to itself", why="a profile changes another one", where=named.where)
    changes = Node({key: node for key, node in tree.value.items() if key != "base"}, tree.file, tree.line)
    return yamlfile.merged(tree_of(below, opened), changes)
