"""Attention over short segments by products: the numbers and gradients of masked softmax attention, for all rows and for some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainers import switches
from trainers.models import short_attention
from trainers.models.attention import Segments
from trainers.models.short_attention import Form, asked, attend, attend_back
from trainers.models.workspace import Lease, Workspace

LENGTHS = [5, 5, 70, 1, 40, 7]
FORM = Form(heads=4, groups=2, width=8, scale=0.3, eps=(0.0, 0.0))
WAYS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "products": ([], {}), "another range": ([], {"SAFE": (1e30, 1e31)}), "fused": (["products"], {}), "long": ([], {"LONG": 60}),
}  # fmt: skip


def inputs(size: float = 1.0, form: Form = FORM) -> list[Tensor]:
    """q, k, v and a gradient, of all tokens."""
    generator = torch.Generator().manual_seed(0)
    widths = (form.heads, form.groups, form.groups, form.heads)
    return [torch.randn(sum(LENGTHS), n * form.width, generator=generator) * size for n in widths]


def wanted(given: list[Tensor], rows: Tensor, form: Form, causal: bool = True) -> list[Tensor]:
    """What torch's attention with a dense mask gives at these rows, and the gradients of q (there), k, v."""
    q, k, v = (one.clone().requires_grad_() for one in given[:3])
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    mask = owner[:, None] == owner
    heads = [one.view(len(one), -1, form.width).transpose(0, 1) for one in (q, k, v)]
    key, value = (one.repeat_interleave(form.heads // form.groups, 0) for one in heads[1:])
    found = F.scaled_dot_product_attention(heads[0], key, value, attn_mask=mask.tril() if causal else mask, scale=form.scale)
    out = found.transpose(0, 1).reshape(len(q), -1)[rows]
    out.backward(given[3][rows])
    return [out.detach(), q.grad[rows], k.grad, v.grad]  # type: ignore[index, list-item]


def found(given: list[Tensor], rows: Tensor | None, form: Form, packing: Segments, lease: Lease) -> list[Tensor]:
    q, k, v, outer = given
    only = None if rows is None else asked(rows, packing)
    q, outer = (one if rows is None else one[rows] for one in (q, outer))
    out, kept = attend(q, k, v, packing, form, only, True, lease.take)
    assert torch.equal(attend(q, k, v, packing, form, only, keep=False)[0], out)
    return [out.clone(), *attend_back(outer.clone(), q, k, v, out, kept, packing, form, only, lease.take)]


def assert_close(mine: list[Tensor], known: list[Tensor]) -> None:
    for one, other in zip(mine, known, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_numbers_and_gradients(way: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    off, changes = WAYS[way]
    for name, value in changes.items():
        monkeypatch.setattr(short_attention, name, value)
    form = Form(4, groups, 8, 0.3, (0.0, 0.0))
    given, packing, everywhere = inputs(form=form), Segments(LENGTHS), torch.arange(sum(LENGTHS))
    some = torch.tensor([0, 3, 4, 12, 40, 41, 42, 79, 81, 90, 127])
    with switches.without(off):
        for rows in (None, some, everywhere, some.flip(0), some[:1]):
            at = everywhere if rows is None else rows
            assert_close(found(given, rows, form, packing, Lease(None)), wanted(given, at, form))


def test_images_see_all_of_themselves() -> None:
    given, packing = inputs(), Segments(LENGTHS, causal=False)
    rows = torch.tensor([3, 50, 60])
    assert_close(found(given, None, FORM, packing, Lease(None)), wanted(given, torch.arange(sum(LENGTHS)), FORM, causal=False))
    assert_close(found(given, rows, FORM, packing, Lease(None)), wanted(given, rows, FORM, causal=False))


@pytest.mark.parametrize("size", [6.0, 30.0])
def test_scores_whose_exponentials_have_no_place_in_fp32(size: float) -> None:
    """Up to scores of thousands."""
    given, rows = inputs(size), torch.tensor([1, 33, 60, 100])
    known = wanted(given, rows, FORM)
    mine = found(given, rows, FORM, Segments(LENGTHS), Lease(None))
    assert all(bool(one.isfinite().all()) for one in mine)
    for one, other in zip(mine, known, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-5 * size**2)


def test_which_rows_are_computed_alone() -> None:
    packing = Segments(LENGTHS)
    plan = asked(torch.tensor([0, 4, 5, 81]), packing)
    assert plan.counts == [2, 1, 0, 0, 1, 0] and plan.unseen is not None
    assert [tuple(one.shape) for one in plan.unseen] == [(2, 5), (1, 5), (0, 70), (0, 1), (1, 40), (0, 7)]
    assert plan.unseen[0].tolist() == [[False, True, True, True, True], [False] * 5]
    assert asked(torch.tensor([4, 0]), packing).counts is None, "out of order"
    with switches.without(["products"]):
        assert asked(torch.tensor([0, 4]), packing).counts is None


def test_buffers_go_from_lease_to_lease() -> None:
    space, places = Workspace(), []
    for rows in (20, 21, 17):
        lease = Lease(space)
        one, other = lease.take(rows, 8), lease.take(rows)
        assert one.shape == (rows, 8) and one.is_contiguous() and len(other) == rows and one.data_ptr() != other.data_ptr()
        places.append((one.data_ptr(), other.data_ptr()))
        lease.end()
        lease.end()
    assert len(set(places)) == 1 and len(space.free) == 2
    Lease(space).take(1000)
    assert len(space.free) == 1, "a larger one takes the place of one that is too small"
    assert space.take(3) is not space.free[0], "a small request leaves the large buffer"
    given, lease = inputs(), Lease(Workspace())
    for seed in (1, 2):  # the second time in used memory
        torch.manual_seed(seed)
        given = [torch.randn_like(one) for one in given]
        assert_close(found(given, None, FORM, Segments(LENGTHS), lease), wanted(given, torch.arange(sum(LENGTHS)), FORM))
        for buffer in lease.held:
            buffer.fill_(torch.nan)
        lease.end()
