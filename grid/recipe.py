"""What a study's recipe may say: training stages, their phases and optimisers, the connector. Typed, strict, every key with its meaning.

`schema.Reader` fills these from YAML: the recipe of a study file, and the `trained` stages of a profile's models.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

from datasets_ray.schema import option

SEEDS = 2**63 - 1
"""The largest seed: torch takes no larger one."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def _name(value: str) -> str | None:
    """What is wrong with a name, and one that would do; None for a good one."""
    if NAME.fullmatch(value) and len(value) <= 100:
        return None
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()).strip("-._+")[:100]
    instead = f"; {plain!r} would be one" if plain else ""
    return f"{value!r} is no name (letters, digits, '.', '_', '+' and '-', at most 100{instead})"


def _phases(phases: list[Phase | None]) -> str | None:
    ends = [phase.until for phase in phases if phase]
    if not ends:
        return "no phase at all"
    if ends != sorted(set(ends)):
        return f"phases end at {ends}, which doesn't rise"
    return None if abs(ends[-1] - 1.0) < 1e-9 else f"the last phase ends at {ends[-1]}, not at 1.0"


def _rates(rates: dict[str, float]) -> str | None:
    if not rates:
        return "no learning rate: nothing would be trained"
    wrong = [f"{part}: {rate}" for part, rate in rates.items() if not 0 < rate < 10]
    return f"learning rate {', '.join(wrong)} is impossible (0 < rate < 10; leave a frozen part out)" if wrong else None


def _betas(betas: list[float]) -> str | None:
    return None if len(betas) == 2 and all(0 <= b < 1 for b in betas) else f"{betas} is not two numbers in [0, 1)"


@dataclass
class Phase:
    """A stretch of a training stage with its own trainable parts."""

    until: float = option("share of all steps at which the phase ends; the last ends at 1.0", above=0.0, high=1.0)
    learning_rates: dict[str, float] = option(
        "part (encoder, connector, llm) → peak learning rate; parts left out are frozen", check=_rates
    )


@dataclass
class Optimizer:
    """Of every training stage that doesn't say otherwise."""

    name: Literal["adamw"] = option("update rule", "adamw")
    betas: list[float] = option("decay of the first and second moment", [0.9, 0.999], check=_betas)
    eps: float = option("added to the root of the second moment", 1e-8, above=0.0)
    weight_decay: float = option("decoupled weight decay", 0.0, low=0.0, high=1.0)


def _no_dropout(dropout: float) -> str | None:
    return None if dropout == 0 else f"{dropout} can't be: its draws would depend on micro-batch and worker count; write 0.0"


@dataclass
class Adapter:
    """Low-rank products beside a part's linear maps, learned in their place and added to them at the stage's end (Hu et al. 2021)."""

    kind: Literal["lora"] = option("form", "lora")
    rank: int = option("inner width of a product", 16, low=1, high=4096)
    alpha: float = option("a product counts alpha / rank times", 32.0, above=0.0)
    dropout: float = option("before the products; 0 only", 0.0, low=0.0, high=1.0, check=_no_dropout)
    targets: str | list[str] = option("`all-linear` (without the vocabulary's), or last names of linear maps such as q_proj", "all-linear")


@dataclass
class Training:
    """One training stage: data, objective, what is trained at which rate, for how long."""

    data: str | list[str] = option("data set(s) of the profile; `none`: the stage is left out")
    epochs: float | None = option("passes over all rows; or give `steps`", None, unit="epochs", above=0.0, high=1000)
    steps: int | None = option("optimiser steps; or give `epochs`", None, unit="steps", low=1, high=1_000_000_000)
    batch: int = option("samples of one optimiser step over all devices", unit="samples", low=1, high=1_000_000)
    phases: list[Phase] = option("what is trained at which peak rate, until when", check=_phases)
    adapters: dict[str, Adapter] = option("part (llm) → low-rank adapters, which then learn in its weights' place at the part's rate", {})
    objective: dict[str, Any] = option("`name` of the objective and its own keys", {"name": "next_token"})
    optimizer: Optimizer = option("update rule", Optimizer)
    schedule: Literal["cosine", "linear", "constant"] = option("shape of the learning rate over all steps", "cosine")
    warmup: float = option("share of steps over which the rate rises from 0", 0.03, low=0.0, high=1.0)
    clip: float | None = option("largest global gradient norm; null: no clipping", None, above=0.0)
    max_tokens: int = option("a sample longer than this is cut (and counted)", 2048, unit="tokens", low=8, high=10_000_000)
    template: str | None = option("conversation template; null: the language model's own", None)
    fit: Literal["crop", "pad", "squash"] | None = option("how an image becomes a square; null: crop", None)
    order: Literal["shuffle", "modality_grouped"] = option("order of samples: seeded shuffle, or steps of one modality", "shuffle")
    seed: int | None = option("of order and fresh weights; null: the arm's", None, low=0, high=SEEDS)


@dataclass
class Connector:
    """Between encoder and language model."""

    builder: Literal["mlp", "linear"] = option("form", "mlp")
    depth: int = option("linear layers, GELU between them", 2, unit="layers", low=1, high=8)


@dataclass
class Recipe:
    """Everything that makes an arm's weights."""

    encoder: str = option("vision encoder, a name of the profile")
    llm: str = option("language model, a name of the profile")
    model: str | None = option("a whole architecture with its own weights instead of encoder + connector + llm", None)
    connector: Connector = option("the connector's form", Connector)
    init: str = option("`fresh` connector, or the name of a released one, which then replaces pretraining", "fresh")
    seed: int | None = option("of fresh weights and data order; null: the study's", None, low=0, high=SEEDS)
    pretrain: Training = option("alignment on captions")
    finetune: Training = option("instruction tuning")
