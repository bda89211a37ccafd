"""Written-out layers: the modules' numbers and gradients, on and off by one switch, and only where the modules are the reproduced ones."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainers import switches
from trainers.batch import TensorBatch, TensorPack
from trainers.flops import Flops
from trainers.models import layer, reading, written_out
from trainers.models.language import CausalLM, causal_lm
from trainers.objectives.next_token import NextToken

LENGTHS = [5, 5, 300, 1, 40, 40, 7]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"}, "biases": {"model_type": "qwen2"}, "narrow heads": {"model_type": "llama", "head_dim": 12},
    "no groups": {"model_type": "llama", "num_key_value_heads": 4},
    "scaled angles": {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
}  # fmt: skip
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def model_of(kind: str) -> CausalLM:
    torch.manual_seed(0)
    llm = causal_lm({**SHAPE, "vocab_size": 50, "max_position_embeddings": 512, **KINDS.get(kind, {"model_type": kind})})
    for parameter in llm.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.15)
    return CausalLM({"llm": llm})


def pack_of(lengths: list[int]) -> TensorPack:
    generator = torch.Generator().manual_seed(1)
    return TensorPack(
        segments=len(lengths), sample=torch.arange(len(lengths)), lengths=torch.tensor(lengths),
        ids=torch.randint(0, 50, (sum(lengths),), generator=generator), positions=torch.cat([torch.arange(n) for n in lengths]),
        image_slots=torch.zeros(0, dtype=torch.long),
    )  # fmt: skip


def taken(model: CausalLM) -> bool:
    return written_out.takes(model.llm.base_model, model.llm.get_input_embeddings().weight)


def switched(on: bool) -> AbstractContextManager[None]:
    return switches.without([] if on else ["layers"])


def passed(model: CausalLM, on: bool, rows: Tensor, only: bool) -> dict[str, Tensor]:
    """States at `rows` and all gradients of a random weighing of them; only: nothing else is asked for."""
    model.zero_grad()
    with switched(on):
        states = model.hidden(pack_of(LENGTHS), rows) if only else model.hidden(pack_of(LENGTHS))[rows]
    (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {"states": states.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients_are_the_modules(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, total = model_of(kind).train(), sum(LENGTHS)
    rows = torch.randperm(total, generator=torch.Generator().manual_seed(3))[:60].sort().values
    assert taken(model)
    wanted = passed(model, False, rows, only=False)
    assert len(wanted) > 1 + 9 * 3
    for chunk in (layer.CHUNK, 64, 1000):
        monkeypatch.setattr(layer, "CHUNK", chunk)
        for on, only in ((True, True), (True, False), (False, True)):
            found = passed(model, on, rows, only)
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                scale = float(value.abs().max())
                torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5 * max(scale, 1e-3), msg=lambda m, n=name: f"{n}: {m}")


def test_micro_batches_one_after_the_other_share_memory_and_nothing_else() -> None:
    model, rows = model_of("biases").train(), torch.arange(0, sum(LENGTHS), 7)
    packs = [pack_of(lengths) for lengths in (LENGTHS, [30, 8], [200, 210, 9])]
    found = {}
    for on in (False, True):
        model.zero_grad()
        with switched(on):
            for pack in (*packs, *packs):
                states = model.hidden(pack, rows[rows < int(pack.lengths.sum())])
                states.square().sum().backward()
        found[on] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    space = written_out.SPACES[model.llm.base_model]
    assert space.free and not any(p.data_ptr() == b.data_ptr() for p in model.parameters() for b in space.free)
    for name, value in found[False].items():
        torch.testing.assert_close(found[True][name], value, rtol=0, atol=2e-5 * float(value.abs().max()))
    loss = model.hidden(packs[0], rows).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second backward pass"):
        loss.backward()


def test_what_is_frozen_gets_no_gradient_and_passes_it_on() -> None:
    model, rows = model_of("biases").train(), torch.arange(0, sum(LENGTHS), 3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed_tokens" in name or "layers.1.self_attn.k_proj" in name or "layers.2.mlp.up_proj" in name)
    wanted, found = (passed(model, on, rows, only=True) for on in (False, True))
    assert found.keys() == wanted.keys() and len(found) == 5
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5 * float(value.abs().max()))


def test_nobody_asked_still_gives_every_parameter_a_gradient_of_zero() -> None:
    model = model_of("llama").train()
    states = model.hidden(pack_of([4, 6]), torch.zeros(0, dtype=torch.long))
    assert states.shape == (0, 64)
    model.logits(states).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_reading_going_on_and_generating_are_the_modules(kind: str) -> None:
    model, logits = model_of(kind).eval(), {}
    for on in (False, True):
        with switched(on):
            state = model.start(pack_of(LENGTHS))
            made = [state.logits]
            further = model.extend(state, torch.tensor([0, 2, 2, 6]), pack_of([3, 1, 6, 2]))
            made += [further.logits, model.branches(further, [0, 1, 1, 3], pack_of([2, 4, 1, 3]))]
            for ids in (torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])):
                made.append(model.step(further, ids))
            further.select(torch.tensor([3, 1]))
            made += [model.step(further, torch.tensor([1, 2])), model.step(state, torch.arange(len(LENGTHS)))]
        logits[on] = made
    for mine, known in zip(logits[True], logits[False], strict=True):
        torch.testing.assert_close(mine, known, rtol=1e-4, atol=2e-5)


def going_on(model: CausalLM, off: list[str], repeats: int = 1) -> list[Tensor]:
    """Logits of prompts that follow one beginning, in runs of equal length, and of what is generated behind them."""
    with switches.without(off):
        first = model.start(pack_of([11]))
        state = model.extend(first, torch.zeros(7 * repeats, dtype=torch.long), pack_of([9, 9, 9, 4, 1, 1, 30] * repeats))
        made = [state.logits, model.step(state, torch.arange(7 * repeats))]
        state.select(torch.tensor([0, 3, 6]))
        return [*made, model.step(state, torch.tensor([3, 2, 1]))]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_that_begin_alike_go_on_as_the_modules(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind).eval()
    wanted = going_on(model, ["layers"])
    seen: list[Any] = []
    monkeypatch.setattr(reading, "attend", lambda *given, real=reading.attend: seen.append(given) or real(*given))
    ways: list[tuple[str, Any]] = [("SAFE", (1e30, 1e31)), ("MOST_SCORES", 300), ("MOST_SCORES", 4), ("NUMBERS", 1), ("MOST_PREPARED", 10)]
    found = [going_on(model, []), going_on(model, ["products"])]
    assert len(seen) == 2 * 2 * 2, "the first two of three layers, of the beginning and of what follows"
    for name, value in ways:
        with monkeypatch.context() as changed:
            changed.setattr(reading, name, value)
            found.append(going_on(model, []))
    for made in found:
        for mine, known in zip(made, wanted, strict=True):
            torch.testing.assert_close(mine, known, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_scores_of_any_size_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponentials leave fp32's range at 88: such rows are read again with their maximum taken away."""
    model = model_of("biases").eval()
    for layer_ in model.llm.base_model.layers:
        layer_.self_attn.k_proj.bias.mul_(400)
        layer_.self_attn.q_proj.bias.mul_(4)
    for mine, known in zip(going_on(model, []), going_on(model, ["layers"]), strict=True):
        assert bool(mine.isfinite().all())
        torch.testing.assert_close(mine, known, rtol=1e-3, atol=2e-3)
    plain = torch.randn(4, 6, 8) * 100
    assert not bool(torch.bmm(plain, plain.transpose(1, 2)).exp().sum(-1).isfinite().all())
    found = reading._seen(plain, plain, plain, 2, 4 + 2 - 2)
    assert bool(found.isfinite().all())


@torch.no_grad()
def test_maps_are_joined_again_when_a_weight_has_changed() -> None:
    model = model_of("biases").eval()
    before = going_on(model, [])
    made = reading.JOINED[model.llm.base_model]
    going_on(model, [])
    assert reading.JOINED[model.llm.base_model] is made, "once"
    model.llm.base_model.layers[1].mlp.down_proj.weight.mul_(1.5)
    after = going_on(model, [])
    assert (after[0] - before[0]).abs().max() > 1e-2
    for mine, known in zip(after, going_on(model, ["layers"]), strict=True):
        torch.testing.assert_close(mine, known, rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_angles_are_looked_up_where_a_position_has_one(kind: str) -> None:
    angles = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    llm = causal_lm({**SHAPE, "vocab_size": 50, "max_position_embeddings": 64, "model_type": "llama", "rope_parameters": angles})
    model = CausalLM({"llm": llm}).eval()
    logits = []
    for off in ([], ["layers"]):
        with switches.without(off):
            state = model.start(pack_of([40, 600]))  # longer than the table's first 512, and than the model was made for
            logits.append([state.logits, model.step(state, torch.tensor([1, 2])), model.start(pack_of([7])).logits])
    for mine, known in zip(*logits, strict=True):
        torch.testing.assert_close(mine, known, rtol=1e-4, atol=2e-5)
    assert (model.llm.base_model in reading.TURNS) == (kind == "yarn")


def test_only_what_is_reproduced_is_taken_over() -> None:
    assert not taken(model_of("qwen3")), "its attention has norms of its own"
    model = model_of("llama")
    assert taken(model) and not taken(model.double())
    model = model_of("llama")
    handle = model.llm.base_model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert not taken(model), "a hook would not be called"
    handle.remove()
    assert taken(model)
    model.llm.base_model.layers[2].self_attn.q_proj = nn.Sequential(model.llm.base_model.layers[2].self_attn.q_proj)
    assert not taken(model), "an adapted map has another forward"
    model = model_of("llama").train()
    model.activation_checkpointing(True)
    assert not taken(model), "activations were to be computed again"


class Products(TorchDispatchMode):
    """Counts two FLOPs a multiply-add of every matrix product, also of those that add to what is there."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func._schema.name.split("::")[1]) in ("mm", "addmm", "addmm_"):
            left, right = args[:2] if name == "mm" else args[1:3]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_the_flops_that_are_counted_are_the_products_that_are_done() -> None:
    model, pack = model_of("biases").train(), pack_of([30, 30, 12])
    learned = torch.arange(3, 60, 4)
    pack = TensorPack(**{**pack.__dict__, "learned": learned, "targets": pack.ids[learned + 1], "most_learned": len(learned)})
    batch = TensorBatch({"text": pack}, torch.arange(3), 3, len(learned), 72)
    flops = Flops(model)
    whole = sum(flops.step([batch]).values()) - flops.parts["llm"]["pairs"] * int(pack.lengths.square().sum())
    with Products() as done:
        NextToken().forward(model, batch).loss_sum.backward()
    assert done.flops == whole
    with switched(False):
        assert flops.parts["llm"]["tokens"] < Flops(model).parts["llm"]["tokens"]
