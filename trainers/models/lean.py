"""RMSNorm and rotary embedding with their gradients written out: the same numbers as transformers', in fewer passes over memory.

In: a language model from transformers. Out: the same module; its norms and attention layers compute through the two functions below.
In small models on a CPU these two cost more than the matrix products: autograd replays RMSNorm as nine element-wise passes and a rotation
as ten, four of them over buffers of zeros for `rotate_half`'s slices. Both also keep less for the backward pass: a norm its input and one
number a token instead of three copies, a rotation only its angles.

Nothing is replaced by name alone: a module or function is taken over if its source is the one that is reproduced here, so that a family
with another norm (Gemma's 1 + weight) or rotation (interleaved halves) keeps its own.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainers import switches

M = TypeVar("M", bound=nn.Module)
ROTATE = "apply_rotary_pos_emb"


class RmsNorm(torch.autograd.Function):
    """x float[..., D] → weight * x / sqrt(mean(x²) + eps), in fp32 inside (Zhang and Sennrich 2019, equation 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed = wide * scale
        return weight * normed.to(x.dtype) if normed.dtype != x.dtype else normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        outer = gradients[0].float()
        normed = x.float() * scale
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (outer * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, by_weight, None
        inner = outer * weight.float()
        # d/dx of x * scale(x): what is parallel to x cancels
        along = (inner * normed).mean(-1, keepdim=True)
        return inner.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), by_weight, None


class Rotation(torch.autograd.Function):
    """Rotates pairs (x[i], x[i + d/2]) by their angles: x float[B, H, L, d], cos and sin float[B, 1, L, d] with equal halves
    (Su et al. 2021, equation 34, in Hugging Face's layout). The gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradients[0], cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb`: q float[B, H, L, d], k float[B, G, L, d], cos and sin float[B, L, d] with equal halves."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotation.apply(q, cos, sin), Rotation.apply(k, cos, sin)  # type: ignore[return-value]


def lean(model: M) -> M:
    """Takes over every norm and rotation of the model whose source is the reproduced one; returns the model."""
    if not switches.on("lean"):
        return model
    for module in model.modules():
        module.__class__ = _lean_class(type(module))  # type: ignore[arg-type]
    return model


@lru_cache(maxsize=256)
def _lean_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class with our functions in it, or the class itself."""
    from transformers.models.llama import modeling_llama as llama

    forward = kind.__dict__.get("forward")
    if not isinstance(forward, FunctionType):
        return kind
    if _body(forward) == _body(llama.LlamaRMSNorm.forward):
        return type(kind.__name__, (kind,), {"forward": _norm, "__module__": kind.__module__})
    if ROTATE in forward.__code__.co_names and _body(forward.__globals__.get(ROTATE)) == _body(getattr(llama, ROTATE)):
        seen = {**forward.__globals__, ROTATE: rotary}
        mine = FunctionType(forward.__code__, seen, forward.__name__, forward.__defaults__, forward.__closure__)
        mine.__kwdefaults__ = forward.__kwdefaults__
        return type(kind.__name__, (kind,), {"forward": mine, "__module__": kind.__module__})
    return kind


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[return-value]


def _body(function: Any) -> str | None:
    """A function's source below its signature and docstring; None where there is none to read."""
    try:
        lines = inspect.getsource(inspect.unwrap(function))
    except (TypeError, OSError):
        return None
    code = lines.split('"""')[-1] if '"""' in lines else lines.partition(":\n")[2]
    return "".join(code.split())
