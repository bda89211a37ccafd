"""Norm and rotation with their gradients written out: transformers' values and gradients, only where the source is the same."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from trainers.models.lean import Rotation, lean, rotary


def norm_and_gradients(norm: torch.nn.Module, x: torch.Tensor, outer: torch.Tensor) -> list[torch.Tensor]:
    norm.zero_grad()
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(outer)
    return [y.detach(), x.grad, norm.weight.grad]  # type: ignore[list-item,union-attr]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-2)])
def test_the_norm_and_its_gradients_are_those_of_transformers(dtype: torch.dtype, close: float) -> None:
    torch.manual_seed(0)
    norm = llama.LlamaRMSNorm(24, eps=1e-5).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x, outer = torch.randn(2, 7, 24, dtype=dtype), torch.randn(2, 7, 24, dtype=dtype)
    theirs = norm_and_gradients(norm, x, outer)
    assert type(lean(norm)) is not llama.LlamaRMSNorm
    for mine, known in zip(norm_and_gradients(norm, x, outer), theirs, strict=True):
        torch.testing.assert_close(mine, known, rtol=close, atol=close)


def test_a_frozen_norm_passes_the_gradient_on() -> None:
    norm = lean(llama.LlamaRMSNorm(8)).requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and norm.weight.grad is None


def test_the_rotation_and_its_gradient_are_those_of_transformers() -> None:
    torch.manual_seed(1)
    q = torch.randn(1, 9, 4, 6).transpose(1, 2).requires_grad_()
    k = torch.randn(1, 9, 2, 6).transpose(1, 2).requires_grad_()
    angles = torch.randn(1, 9, 3).repeat(1, 1, 2)
    outer = torch.randn(1, 4, 9, 6), torch.randn(1, 2, 9, 6)
    found = {}
    for name, function in (("theirs", llama.apply_rotary_pos_emb), ("mine", rotary)):
        turned = function(q, k, angles.cos(), angles.sin())
        found[name] = [*turned, *torch.autograd.grad(turned, (q, k), outer)]
    for mine, known in zip(found["mine"], found["theirs"], strict=True):
        torch.testing.assert_close(mine, known, rtol=1e-6, atol=1e-6)
    assert Rotation.apply(q, angles.cos()[:, None], angles.sin()[:, None]).shape == q.shape


def test_both_are_right_to_the_last_digit_of_a_numerical_gradient() -> None:
    torch.manual_seed(2)
    from trainers.models.lean import RmsNorm

    x, weight = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), torch.rand(6, dtype=torch.float64, requires_grad=True)
    # the norm computes in fp32 inside: a numerical gradient of it is good to three digits
    assert torch.autograd.gradcheck(lambda a, b: RmsNorm.apply(a, b, 1e-6), (x, weight), eps=1e-2, atol=2e-3, rtol=2e-3)
    q = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(1, 1, 5, 2, dtype=torch.float64).repeat(1, 1, 1, 2)
    assert torch.autograd.gradcheck(lambda a: Rotation.apply(a, angle.cos(), angle.sin()), (q,))


def test_models_of_the_same_source_are_taken_over_and_others_are_not() -> None:
    config = qwen2.Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(3)
    model = qwen2.Qwen2ForCausalLM(config).eval()
    ids = torch.randint(0, 32, (2, 6))
    before = model(ids).logits
    names = list(model.state_dict())
    lean(model)
    replaced = [type(m).__mro__[1].__name__ for m in model.modules() if type(m).__mro__[1] in (qwen2.Qwen2RMSNorm, qwen2.Qwen2Attention)]
    assert replaced.count("Qwen2RMSNorm") == 5 and replaced.count("Qwen2Attention") == 2
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
    assert type(lean(GemmaRMSNorm(8))) is GemmaRMSNorm
    assert type(qwen2.Qwen2ForCausalLM(config).model.norm) is qwen2.Qwen2RMSNorm, "transformers' own classes stay as they are"
