"""Connectors: image features float[N, K, D_encoder] → token embeddings float[N, K, D_llm]. A new one is a function and a line.

`mlp` of depth 2 is LLaVA-1.5's mlp2x_gelu (Linear, GELU, Linear; Liu et al. 2023, "Improved Baselines", section 3.3), with its names,
so that a released `mm_projector.bin` loads as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from datasets_ray.errors import UserError, nearest


def linear(config: dict[str, Any], inputs: int, outputs: int) -> nn.Module:
    """One affine map. No config."""
    _only(config, "linear", ())
    return nn.Linear(inputs, outputs)


def mlp(config: dict[str, Any], inputs: int, outputs: int) -> nn.Module:
    """`depth` affine maps with GELU between them; default 2."""
    _only(config, "mlp", ("depth",))
    depth = config.get("depth", 2)
    if not isinstance(depth, int) or depth < 1:
        raise UserError(f"connector mlp of depth {depth!r}", hint="depth: 2")
    layers: list[nn.Module] = [nn.Linear(inputs, outputs)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(outputs, outputs)]
    return nn.Sequential(*layers)


CONNECTORS: dict[str, Callable[[dict[str, Any], int, int], nn.Module]] = {"linear": linear, "mlp": mlp}


def connector(part: dict[str, Any], inputs: int, outputs: int) -> nn.Module:
    """A connector by its builder's name: {"builder": "mlp", "config": {"depth": 2}}. inputs, outputs: the widths on its two sides."""
    if part["builder"] not in CONNECTORS:
        raise UserError(f"unknown connector {part['builder']!r}", hint=nearest(part["builder"], CONNECTORS))
    return CONNECTORS[part["builder"]](part["config"], inputs, outputs)


def _only(config: dict[str, Any], builder: str, known: tuple[str, ...]) -> None:
    for key in config:
        if key not in known:
            raise UserError(f"connector {builder} has no setting {key!r}", hint=nearest(key, known))
