"""Which language models run written out (`trainers.models.layer`), and how: base model, embeddings, positions, packing in, states out.

    run(base, x float[B, L, D], positions, packing) ──► float[B * L, D] after the final norm; with `rows` float[K, D]

In training layers are one function each; in prediction keys and values go to the cache between two halves of it, and in the last layer
only each prompt's last token asks. Nothing is taken over by name: classes are compared with the source that is reproduced
(`trainers.models.lean`), and maps that are adapted, sharded (ZeRO 3), hooked or not fp32 on a CPU run as the modules they are.
The switch `layers` turns it off.
"""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trainers import switches
from trainers.models import lean, reading
from trainers.models.attention import Packing, Segments
from trainers.models.decoding import Step
from trainers.models.layer import Form, Layer, after, attend, paired, projected
from trainers.models.workspace import Workspace

FLASH = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
"""torch's fused attention and its gradient, which `scaled_dot_product_attention` runs on a CPU."""

SPACES: WeakKeyDictionary[Any, Workspace] = WeakKeyDictionary()
"""Base model → what its layers write to while it trains."""


def takes(base: Any, x: Tensor) -> bool:
    """Whether this base model's layers are the ones that are reproduced here, and can be now."""
    if not (switches.on("layers") and switches.on("segments")):
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or not _known(type(base)):
        return False
    if _hooked(base) or base.training and getattr(base, "gradient_checkpointing", False):
        return False
    return all(_plain(layer) for layer in base.layers)


def _plain(layer: Any) -> bool:
    attention: Any = layer.self_attn
    mlp: Any = getattr(layer, "mlp", None)
    if not (_known(type(layer)) and _known(type(attention)) and _known(type(mlp)) and isinstance(mlp.act_fn, _silu())):
        return False
    if getattr(attention, "sliding_window", None) is not None:
        return False
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    maps = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return (
        all(type(one).forward is lean._norm for one in norms) and all(type(one) is nn.Linear for one in maps)
        and all(one.bias is None for one in maps[3:])
        and not any(_hooked(module) for module in (layer, attention, mlp, *norms, *maps))
        and not any(hasattr(one.weight, "ds_id") or one.weight.dtype != torch.float32 for one in (*norms, *maps))
    )  # fmt: skip


def _hooked(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


@lru_cache(maxsize=1)
def _silu() -> tuple[type, ...]:
    from transformers.activations import ACT2FN

    return (nn.SiLU, type(ACT2FN["silu"]))


def _known(kind: Any) -> bool:
    """Whether a class computes what Llama's or Qwen2's layer, attention, MLP or model does, by its source; and torch has the kernels."""
    return _computes(kind)


@lru_cache(maxsize=256)
def _computes(kind: Any) -> bool:
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    if not all(hasattr(torch.ops.aten, name) for name in FLASH):
        return False
    forward = next((c.__dict__["forward"] for c in kind.__mro__ if isinstance(c.__dict__.get("forward"), FunctionType)), None)
    if forward is None:
        forward = getattr(kind, "forward", None)
    body = lean._body(forward)
    if body is None:
        return False
    named = forward.__code__.co_names if isinstance(forward, FunctionType) else ()
    if lean.ROTATE in named and forward.__globals__.get(lean.ROTATE) is not lean.rotary:  # type: ignore[union-attr]
        return False
    same = [
        getattr(module, prefix + name).forward
        for module, prefix in ((llama, "Llama"), (qwen2, "Qwen2")) for name in ("Model", "DecoderLayer", "Attention", "MLP")
    ]  # fmt: skip
    return any(body == lean._body(one) for one in same)


def run(base: Any, x: Tensor, positions: Tensor, packing: Packing, cache: Any = None, rows: Tensor | None = None) -> Tensor:
    """x float[B, L, D], positions int64[B, L] → float[B * L, D] after the final norm; with rows int64[K] of the B * L, none twice,
    float[K, D]. With a cache the rows are each prompt's last."""
    turn = reading.turns(base, x, positions, cache is not None)[:, None]
    shape, hidden = x.shape[:2], x.flatten(0, 1)
    layers = base.layers[: base.config.num_hidden_layers]
    maps = None if cache is None else reading.prepared(base, [(form_of(layer), weights_of(layer)) for layer in layers])
    space = SPACES.setdefault(base, Workspace()) if torch.is_grad_enabled() else None
    for number, layer in enumerate(layers):
        wanted = rows if number + 1 == len(layers) else None
        if cache is None and isinstance(packing, Segments):
            weights = weights_of(layer)
            if not torch.is_grad_enabled():  # or the function would keep what its gradient needs
                weights = tuple(None if one is None else one.detach() for one in weights)
            hidden = Layer.apply(hidden, turn, wanted, packing, form_of(layer), space, *weights)  # type: ignore[assignment]
        elif maps is not None:
            hidden = reading.layer(maps[number], number, hidden, turn, wanted, packing, cache, shape)
        else:
            hidden = _cached(layer, hidden, turn, wanted, packing, cache, shape)
    return base.norm(hidden)


def form_of(layer: Any) -> Form:
    attention = layer.self_attn
    width = attention.head_dim
    heads, groups = attention.q_proj.out_features // width, attention.k_proj.out_features // width
    eps = (layer.input_layernorm.variance_epsilon, layer.post_attention_layernorm.variance_epsilon)
    return Form(heads, groups, width, attention.scaling, eps)


def weights_of(layer: Any) -> tuple[Tensor | None, ...]:
    """In the order of `Layer.forward`."""
    a, m = layer.self_attn, layer.mlp
    return (
        layer.input_layernorm.weight, a.q_proj.weight, a.q_proj.bias, a.k_proj.weight, a.k_proj.bias, a.v_proj.weight, a.v_proj.bias,
        a.o_proj.weight, layer.post_attention_layernorm.weight, m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight,
    )  # fmt: skip


def _cached(layer: Any, x: Tensor, turn: Tensor, rows: Tensor | None, packing: Packing, cache: Any, shape: torch.Size) -> Tensor:
    """A layer in prediction: keys and values go to the cache, whoever asks sees what the packing lets him see. x float[B * L, D]; rows:
    each prompt's last token, which sees all of its prompt."""
    assert not torch.is_grad_enabled(), "keys and values are kept for prediction only"
    form = form_of(layer)
    n1, wq, bq, wk, bk, wv, bv, wo, n2, wg, wu, wd = weights_of(layer)
    wq, bq, wk, bk = paired(form, wq, bq, wk, bk)  # type: ignore[arg-type]
    (k, v), _ = projected(x, turn, form, n1, ((wk, bk, True), (wv, bv, False)))  # type: ignore[arg-type]
    key, value = (one.view(*shape, -1, form.width).transpose(1, 2) for one in (k, v))
    key, value = cache.update(key, value, layer.self_attn.layer_idx)
    if rows is not None:
        x, turn = x[rows], turn[rows]
    ((q,), _) = projected(x, turn, form, n1, ((wq, bq, True),))  # type: ignore[arg-type]
    if rows is not None:
        keys, values, visible = cache.held(layer.self_attn.layer_idx)
        attended = Step(visible).attend(q.view(len(x), form.heads, 1, form.width), keys, values, form.scale).reshape(len(x), -1)
    elif isinstance(packing, Segments):
        attended = attend(q, k, v, packing, form)[0]
    else:
        query = q.view(*shape, -1, form.width).transpose(1, 2)
        attended = packing.attend(query, key, value, form.scale).reshape(len(x), -1)
    return after(x, attended, form, wo, n2, wg, wu, wd, keep=False)[0]  # type: ignore[arg-type]
