"""The memory model against the modules: for ten named shapes and some more, what grid.footprint says is within 10 % of what a step holds.

Measured: weights, gradients and AdamW's state by their tensors after a step; activations by autograd's saved-tensor hooks, each storage
once, weights left out (with recomputation: what the forward pass leaves and, beside it, one block's); and as a second opinion the
allocator's own record of a whole micro-batch, where everything that comes and goes is in, too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets_ray.packing import Batch, Segment, pack
from datasets_ray.tokens import IGNORE, IMAGE_ID
from grid import footprint, shapes
from grid.footprint import Adapter, Load
from trainers import adapters, engine, models, optim, switches
from trainers.batch import TensorBatch, to_device
from trainers.context import Context
from trainers.models.attention import Segments
from trainers.objectives import load_objective, next_token

PATCH, SIDE = 8, 64
IMAGE = (SIDE // PATCH) ** 2
CLIP = {
    "embed_dim": 48, "vision_cfg": {"image_size": SIDE, "patch_size": PATCH, "width": 96, "layers": 3, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}  # fmt: skip
LLMS = {  # the released 7B models' proportions: inner / width, heads / key-value heads, vocabulary / width
    "llama": {
        "model_type": "llama", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
    "qwen2": {
        "model_type": "qwen2", "vocab_size": 4096, "hidden_size": 224, "intermediate_size": 1184, "num_hidden_layers": 4,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
}  # fmt: skip
QWEN2_VL = {
    "model_type": "qwen2_vl",
    "vision_config": {
        "depth": 3, "embed_dim": 96, "hidden_size": 224, "num_heads": 3, "mlp_ratio": 4, "patch_size": PATCH, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "text_config": {
        **{key: value for key, value in LLMS["qwen2"].items() if key != "model_type"},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    },
    "image_token_id": 4095, "video_token_id": 4094, "tie_word_embeddings": False,
}  # fmt: skip
LORA = {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.0, "targets": "all-linear"}


@pytest.fixture(autouse=True)
def modules() -> Generator[None]:
    """Layers as the modules they are, as on a GPU: written-out layers keep less, and plans are made for GPUs."""
    with switches.without(["layers"]):
        yield


@dataclass(frozen=True)
class Case:
    llm: str
    learns: tuple[str, ...]
    again: bool = False
    lora: bool = False
    precision: str = "fp32"
    most_logits: int = next_token.CHUNK_LOGITS
    lengths: tuple[int, ...] = (61, 190, 120, 95)
    """Text tokens of the samples; each but the last has an image."""


CONNECTOR, FULL = ("connector",), ("connector", "llm")
TEN = {
    **{
        f"{llm}, {name}, {'recomputing' if again else 'plain'}": Case(llm, learns, again)
        for llm in LLMS
        for name, learns in (("connector", CONNECTOR), ("full", FULL))
        for again in (False, True)
    },
    "llama, LoRA": Case("llama", FULL, lora=True),
    "qwen2-vl, language model": Case("qwen2_vl", ("llm",)),
}
MORE = {
    "qwen2, LoRA, recomputing": Case("qwen2", FULL, again=True, lora=True),
    "llama, full, 16 bits": Case("llama", FULL, precision="bf16"),
    "llama, connector, 16 bits, recomputing": Case("llama", CONNECTOR, again=True, precision="bf16"),
    "qwen2, everything": Case("qwen2", ("encoder", "connector", "llm")),
    "qwen2-vl, connector": Case("qwen2_vl", ("connector",)),
    "llama, full, samples of one length": Case("llama", FULL, lengths=(80, 80, 80)),
}


def part(builder: str, config: dict[str, Any], seed: int) -> dict[str, Any]:
    return {"builder": builder, "config": config, "weights": {"fresh": seed}}


def spec_of(case: Case) -> dict[str, Any]:
    if case.llm == "qwen2_vl":
        return {"family": "qwen2_vl", "parts": {name: part("qwen2_vl", QWEN2_VL, 1) for name in ("encoder", "connector", "llm")}}
    join, llm = part("mlp", {"depth": 2}, 2), part("causal_lm", LLMS[case.llm], 3)
    return {"family": "vlm", "parts": {"encoder": part("open_clip", CLIP, 1), "connector": join, "llm": llm}}


def batch_of(case: Case) -> TensorBatch:
    """One micro-batch: samples of an image (but the last) and text, of which the second half is learned."""
    rng, segments = np.random.default_rng(0), []
    uniform = case.llm != "qwen2_vl"
    for number, length in enumerate(case.lengths):
        has_image = number + 1 < len(case.lengths) or len(set(case.lengths)) == 1
        slots = [IMAGE_ID] * ((IMAGE if uniform else IMAGE // 4) * has_image)
        ids = np.array([1, *slots, *rng.integers(3, 2000, size=length - 1)], dtype=np.int64)
        labels = np.where(np.arange(len(ids)) > len(slots) + length // 2, ids, IGNORE)
        images = (rng.integers(0, 256, size=(SIDE, SIDE, 3), dtype=np.uint8),) * has_image
        grids = np.array([[1, SIDE // PATCH, SIDE // PATCH]] * has_image, dtype=np.int64).reshape(-1, 3)
        segments.append(Segment(ids, labels, images, grids, len(ids)))
    made = pack(segments, list(range(len(segments))), (SIDE, SIDE) if uniform else None)
    valid = sum(segment.valid for segment in segments)
    return to_device(Batch({"text": made}, len(segments), valid, {"text": valid}, {"text": valid}))


def load_of(case: Case, batch: TensorBatch) -> Load:
    stream = batch.streams["text"]
    assert stream.images is not None and stream.image_slots is not None and stream.learned is not None
    plan = Segments(stream.lengths.tolist())
    padded = 0 if plan.in_place else sum(rows * length for rows, length in plan.buckets)
    patches = len(stream.images) * (IMAGE + (case.llm != "qwen2_vl"))
    return Load(stream.tokens, len(stream.learned), patches, len(stream.image_slots), fused=False, padded=padded)


def model_of(case: Case, folder: Path) -> Any:
    ctx = Context.local(folder, {"id": "train-test", "spec": {}, "runtime": {"activation_checkpointing": case.again}})
    model = models.build(spec_of(case), ctx, precision=case.precision)
    adapters.attach(model, {"llm": LORA} if case.lora else None, 0)
    models.train_parts(model, set(case.learns))
    adapters.freeze_rest(model)
    return model


def shapes_of(case: Case) -> dict[str, shapes.Shape]:
    if case.llm == "qwen2_vl":
        return shapes.qwen2_vl(QWEN2_VL)
    encoder, llm = shapes.vision_tower(CLIP["vision_cfg"], skip=1), shapes.language_model(LLMS[case.llm])
    return {"encoder": encoder, "connector": shapes.connector(2, encoder.width, llm.width), "llm": llm}


def predicted(case: Case, load: Load) -> dict[str, float]:
    found = shapes_of(case)
    sizes = {name: shape.params for name, shape in found.items()}
    return footprint.footprint(
        {"family": spec_of(case)["family"], "shapes": found}, set(case.learns), sizes, load, width=4 if case.precision == "fp32" else 2,
        again=case.again, adapters={"llm": Adapter(LORA["rank"])} if case.lora else None,
    )  # fmt: skip


@contextmanager
def kept(model: torch.nn.Module) -> Generator[dict[int, int]]:
    """Storages that autograd keeps of what runs inside: address → bytes, the model's weights left out. They live until the end."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def bytes_of(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors)


def allocated(run: Callable[[], Any]) -> int:
    """Most bytes that the allocator had given out at any time during `run` beyond what it had before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def measure(case: Case, folder: Path, record: bool = True) -> tuple[dict[str, float], Load]:
    """Bytes by kind, as `footprint` names them. record: also the allocator's view of a second micro-batch, on top of what stays."""
    torch.manual_seed(0)
    model, batch = model_of(case, folder), batch_of(case)
    objective = load_objective({"name": "next_token", "most_logits": case.most_logits})
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3)
    entered: list[Any] = []

    def run() -> None:
        objective.forward(model, batch).loss_sum.backward()

    def remember(module: Any, given: Any, named: Any) -> None:
        entered.append((given, named))

    run()
    optimizer.step()
    made = {
        "weights": bytes_of(model.parameters()), "gradients": bytes_of(p.grad for p in learned),
        "optimizer": bytes_of(t for state in optimizer.state.values() for t in state.values() if t.ndim),
    }  # fmt: skip
    if record:
        made["record"] = made["weights"] + made["gradients"] + made["optimizer"] + allocated(run)
    language = model.llm.base_model
    with kept(model) as found:
        hook = language.layers[-1].register_forward_pre_hook(remember, with_kwargs=True)
        loss = objective.forward(model, batch).loss_sum
        hook.remove()
    made["activations"] = sum(found.values())
    if case.again:
        with kept(model) as tail:
            states = torch.zeros(1, batch.tokens, language.norm.weight.shape[0], dtype=model.dtype if hasattr(model, "dtype") else None)
            objective.loss_sum(model, batch.streams["text"], language.norm(states.requires_grad_())[0])
        layer, ((states, *given), named) = language.layers[-1], entered[0]
        layer.gradient_checkpointing = False
        with kept(model) as block:
            layer(states.detach().requires_grad_(), *given, **named)
        before = set(found)
        again = sum(size for address, size in block.items() if address not in before and address != states.data_ptr())
        made["activations"] += max(0, again - sum(tail.values()))
    del loss
    made["total"] = sum(made[kind] for kind in ("weights", "gradients", "optimizer", "activations"))
    return made, load_of(case, batch)


@pytest.mark.parametrize("name", [*TEN, *MORE])
def test_a_step_holds_what_the_model_says(name, tmp_path):
    case = (TEN | MORE)[name]
    found, load = measure(case, tmp_path, record=name in TEN)
    said = predicted(case, load)
    assert said["weights"] == found["weights"] and said["host"] == 0
    assert said["activations"] == pytest.approx(found["activations"], rel=0.1)
    if case.precision == "fp32":  # at 16 bits gradients and state are the engine's, below
        assert (said["gradients"], said["optimizer"]) == (found["gradients"], found["optimizer"])
        assert said["total"] - said["workspace"] == pytest.approx(found["total"], rel=0.1)
    if "record" in found:
        assert said["total"] == pytest.approx(found["record"], rel=0.1)


def test_chunks_of_logits_are_not_kept(tmp_path, monkeypatch):
    """More logits than the objective makes at once: their log-probabilities are recomputed."""
    monkeypatch.setattr(footprint, "CHUNK_LOGITS", 1 << 17)
    case = Case("llama", FULL, most_logits=1 << 17)
    found, load = measure(case, tmp_path)
    said = predicted(case, load)
    whole = predicted(Case("llama", FULL), Load(**{**vars(load), "learned": 1}))
    assert said["activations"] == pytest.approx(found["activations"], rel=0.1)
    assert said["activations"] - whole["activations"] < load.learned * 2048 * 4 / 4
    assert said["total"] == pytest.approx(found["record"], rel=0.1)


def test_numbers_that_stand_twice_are_equal():
    assert footprint.CHUNK_LOGITS == next_token.CHUNK_LOGITS
    assert footprint.BUCKET == engine.BUCKET


@pytest.mark.parametrize("precision, zero", [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2), ("bf16", 3)])
def test_the_engine_holds_what_the_model_says(tmp_path, precision, zero):
    """Masters, moments and accumulated gradients of a DeepSpeed engine, in bytes a learned parameter."""
    case = Case("llama", FULL, precision=precision)
    model, batch = model_of(case, tmp_path), batch_of(case)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    objective = load_objective({"name": "next_token"})
    groups = optim.parameter_groups(model.parts, dict.fromkeys(case.learns, 1e-3), 0.0)
    one = engine.Engine(model, objective, groups, {}, zero=zero, precision=precision)
    for last in (False, True):
        loss, _ = one.forward(batch)
        one.backward(loss / batch.valid_tokens, last=last)
    inner, held = one.optimizer, []
    if precision == "fp32":
        held = [gradient for group in inner.averaged_gradients.values() for gradient in group]
    elif zero == 1:
        held = inner.fp32_groups_gradients_flat
        assert all(p.grad is None for p in model.parameters()), "16-bit gradients are added up at once and not kept beside"
    elif zero == 2:
        held = [group.flat_partition for group in inner.averaged_gradients.values()]
    else:
        held = [inner.grad_partitions_flat_buffer]
    assert {tensor.dtype for tensor in held} == {torch.float32}
    one.step(dict.fromkeys(case.learns, 1e-3))
    fragments = one.fragments().values()
    state = sum(f.master.nbytes + sum(m.nbytes for m in f.moments.values()) for f in fragments)
    said = footprint.state(learned, learned, 4 if precision == "fp32" else 2, 1, zero, False)
    assert sum(t.nbytes for t in held) == pytest.approx(said["gradients"], rel=0.01)
    assert state == said["optimizer"] == 12 * learned
    one.destroy()
