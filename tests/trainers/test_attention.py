"""Packed attention equals dense attention under a block-diagonal mask, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from datasets_ray.errors import UserError
from trainers.models.attention import Segments, packed_attention


def dense(query, key, value, lengths, causal, scale):
    """The law's other side: one [T, T] mask. Shapes as in Segments.attend."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = owner[:, None] == owner[None]
    if causal:
        mask &= torch.ones_like(mask).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "whole"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [3, 1, 200, 7, 130, 64, 65, 90, 1], [66, 66, 2, 150]], ids=str)
def test_packed_attention_is_dense_attention_with_a_block_diagonal_mask(lengths, groups, causal):
    g = torch.Generator().manual_seed(0)
    total = sum(lengths)
    shapes = [(1, 4, total, 8), (1, groups, total, 8), (1, groups, total, 8)]
    inputs = [torch.randn(s, generator=g, requires_grad=True) for s in shapes]
    segments = Segments(lengths, causal=causal)
    ours, theirs = segments.attend(*inputs, 0.3), dense(*inputs, lengths, causal, 0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    weight = torch.randn(ours.shape, generator=g)
    for mine, other in zip(torch.autograd.grad((ours * weight).sum(), inputs), torch.autograd.grad((theirs * weight).sum(), inputs)):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)


def test_buckets_bound_the_padding():
    segments = Segments([500, 20, 400, 60, 64, 10, 300, 5, 499])
    area = sum(rows * width * width for rows, width in segments.buckets if width > Segments.SHORT)
    real = sum(n * n for n in segments.lengths if n > Segments.SHORT)
    assert area <= real / Segments.WASTE**2
    assert len(segments.buckets) == 3, "500-400, 300, and everything short"
    assert Segments([7, 7, 7]).in_place and not Segments([7, 3, 7]).in_place


def test_features_that_would_change_the_result_are_refused():
    segments = Segments([10])
    x = torch.randn(1, 2, 10, 8)
    assert packed_attention(torch.nn.Identity(), x, x, x, None, packing=segments, sliding_window=10)[0].shape == (1, 10, 2, 8)
    with pytest.raises(UserError, match="sliding window of 9"):
        packed_attention(torch.nn.Identity(), x, x, x, None, packing=segments, sliding_window=9)
    with pytest.raises(UserError, match="softcap"):
        packed_attention(torch.nn.Identity(), x, x, x, None, packing=segments, softcap=30.0)
