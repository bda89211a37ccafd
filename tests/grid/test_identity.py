"""Stage identity: hash of everything that can change a result and of nothing that can't."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from grid import identity, profile, recipe, study
from grid.identity import CLASSES, IDENTITY, RUNTIME, STRUCTURE
from grid.plan import make_plan
from tests.grid.studies import PROFILE, STUDY, changed, write


def configuration() -> Iterator[str]:
    """Every `Class.field` of study and profile files."""
    for module in (study, recipe, profile):
        for kind in vars(module).values():
            if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__ and kind is not profile.Asset:
                yield from (f"{kind.__name__}.{field.name.rstrip('_')}" for field in dataclasses.fields(kind))


def test_every_configuration_field_is_classed_and_nothing_else_is():
    assert set(CLASSES) == set(configuration())
    assert set(CLASSES.values()) == {IDENTITY, RUNTIME, STRUCTURE}


CHANGES: dict[str, str] = {
    "Study.seed": "seed=4",
    "Recipe.encoder": "axes.encoder={weak: {encoder: strong}, strong: {encoder: weak}}",
    "Recipe.llm": "base.llm=thinker",
    "Recipe.model": "recipe.model=elder",
    "Recipe.init": "axes.updating.full.init=rivals-connector",
    "Recipe.seed": "recipe.seed=5",
    "Connector.builder": "recipe.connector.builder=linear",
    "Connector.depth": "recipe.connector.depth=3",
    "Training.data": "recipe.finetune.data=captions",
    "Training.epochs": "recipe.finetune.epochs=2",
    "Training.steps": "recipe.finetune={epochs: null, steps: 7, data: chats, batch: 4, phases: [{until: 1, learning_rates: {llm: 1e-3}}]}",
    "Training.batch": "recipe.finetune.batch=5",
    "Training.objective": "recipe.finetune.objective={name: contrastive}",
    "Training.schedule": "recipe.finetune.schedule=linear",
    "Training.warmup": "recipe.finetune.warmup=0.1",
    "Training.clip": "recipe.finetune.clip=1.0",
    "Training.max_tokens": "recipe.finetune.max_tokens=100",
    "Training.template": "recipe.finetune.template=plain",
    "Training.fit": "recipe.finetune.fit=squash",
    "Training.order": "recipe.finetune.order=shuffle",
    "Training.seed": "recipe.finetune.seed=8",
    "Adapter.rank": "recipe.finetune.adapters={llm: {rank: 8}}",
    "Phase.until": "recipe.finetune.phases=[{until: 0.5, learning_rates: {llm: 1e-3}}, {until: 1, learning_rates: {llm: 1e-3}}]",
    "Phase.learning_rates": "recipe.finetune.phases=[{until: 1, learning_rates: {connector: 1e-3, llm: 2e-3}}]",
    "Optimizer.betas": "recipe.finetune.optimizer.betas=[0.9, 0.95]",
    "Optimizer.eps": "recipe.finetune.optimizer.eps=1e-6",
    "Optimizer.weight_decay": "recipe.finetune.optimizer.weight_decay=0.1",
    "Benchmark.data": "benchmarks.counts.data=birds",
    "Benchmark.negatives": "benchmarks.birds.negatives=given",
    "Benchmark.metric": "benchmarks.birds.metric=accuracy",
    "Benchmark.zeroshot": "benchmarks.birds.zeroshot=false",
    "Benchmark.templates": "benchmarks.birds.templates=['a {}', 'one {}']",
    "Benchmark.ensemble": "benchmarks.birds.ensemble=flowers",
    "Benchmark.suffix": "benchmarks.counts.suffix=Say it.",
    "Benchmark.rule": "benchmarks.counts.rule=strict",
    "Benchmark.max_new_tokens": "benchmarks.counts.max_new_tokens=9",
    "Mining.miner": "mining.miner=fourth",
    "Mining.k": "mining.k=3",
    "Mining.template": "mining.template=a drawing of a {}",
    "Mining.question": "mining.question=What is it?",
    "Mining.seed": "mining.seed=1",
    "Evaluation.suffix": "evaluation.suffix=Answer.",
    "Evaluation.options": "evaluation={options: hidden, method: likelihood}",
    "Evaluation.rule": "evaluation.rule=strict",
    "Evaluation.max_new_tokens": "evaluation.max_new_tokens=9",
    "Evaluation.fit": "evaluation.fit=squash",
    "Controls.seed": "controls.seed=1",
    "Limits.dropped": "limits.dropped=0.5",
    "Profile.allow_subset": "allow_subset=true",
    "Profile.batch_scale": "batch_scale=0.5",
    "Data.expect": "data.chats.expect=30",
    "Data.allow_subset": "data.chats.allow_subset=true",
    "Profile.precision": "precision=bf16",
    "Image.mean": "encoders.weak.image.mean=[0.5, 0.5, 0.5]",
    "Image.std": "encoders.weak.image.std=[0.5, 0.5, 0.5]",
    "Encoder.config": "encoders.weak.config.embed_dim=32",
    "Encoder.seed": "encoders.weak.seed=9",
    "Encoder.checkpoint": "encoders.weak={image: {size: 32, patch: 8}, checkpoint: some/where, config: {name: ViT}}",
    "Encoder.revision": "encoders.weak={image: {size: 32, patch: 8}, checkpoint: some/where, revision: x, config: {name: ViT}}",
    "Llm.config": "llms.talker.config.hidden_size=64",
    "Llm.seed": "llms.talker.seed=9",
    "Llm.tokenizer": "llms.talker.tokenizer=tiny-qwen2",
    "Llm.checkpoint": "llms.talker={checkpoint: some/where, tokenizer: tiny-llama}",
    "Llm.revision": "llms.talker={checkpoint: some/where, revision: x, tokenizer: tiny-llama}",
    "Model.stand_in": "models.rival.stand_in.seed=10",
    "Data.keys": "data.chats.keys.rows=31",
    "Data.source": "data.chats.source=grocery",
    "Data.revision": "data.chats.revision=v2",
}
"""Identity field → a setting that changes it (several need others beside)."""

OF_ELDER = {
    "Model.checkpoint": "models.elder.checkpoint=nowhere/else", "Model.revision": "models.elder.revision=def",
    "Model.template": "models.elder.template=plain", "Model.tokenizer": "models.elder.tokenizer=tiny-qwen2",
    "Image.merge": "models.elder.image.merge=1", "Image.min_pixels": "models.elder.image.min_pixels=128",
    "Image.max_pixels": "models.elder.image.max_pixels=8192",
    "Model.family": "models.elder={family: vlm, checkpoint: nowhere/elder, config: {encoder: {}, connector: {}, llm: {}}}",
    "Model.config": "models.elder.config={name: x}", "Image.kind": "models.elder.image={kind: square, size: 32, patch: 8}",
}  # fmt: skip
OF_ADAPTERS = {
    "Adapter.alpha": "recipe.finetune.adapters={llm: {alpha: 8}}",
    "Adapter.targets": "recipe.finetune.adapters={llm: {targets: [q_proj]}}",
}
OF_BRIDGE = {
    "Bridge.checkpoint": "connectors.rivals-connector={checkpoint: b/a}",
    "Bridge.revision": "connectors.rivals-connector={checkpoint: a/b, revision: c}",
}
ONE_VALUE = {
    "Optimizer.name", "Encoder.builder", "Adapter.kind", "Adapter.dropout", "Evaluation.method", "Reference.released", "Model.seed",
    "Model.prompts", "Model.remote_code", "Benchmark.judge", "Judge.model",
}  # fmt: skip
"""Fields with a single value so far, and those whose change needs another study (tested by name below, in test_plan, in test_judged_plan
or in test_existing_vlms)."""

KEEPS: dict[str, str] = {
    "Study.study": "study=other", "Study.question": "question=Why?", "Study.paper_cost": "paper_cost={devices: 1, device: x, hours: 2}",
    "Study.groups": "groups={all: [birds, counts]}", "Study.contrasts": "contrasts=[]", "Study.assumptions": "assumptions=[]",
    "Profile.about": "about=other", "Profile.miniature": "miniature=false",
    "Profile.hollow": "hollow=true",
    "Profile.data_root": "data_root=/some/where", "Profile.store": "store=/some/where", "Tracking.uri": "tracking.uri=http://some.where",
    "Data.tokens": "data.chats.tokens=99", "Data.images": "data.chats.images=2", "Data.megabytes": "data.chats.megabytes=9",
    "Data.rows": "data.chats.rows=7", "Device.name": "device.name=H100",
    "Device.tflops": "device.tflops=900", "Device.mfu": "device.mfu=0.5",
    "Device.memory_gib": "device.memory_gib=80", "Device.host_gib": "device.host_gib=9", "Resources.offload": "resources.offload=true",
    "Resources.workers": "resources.workers=4", "Resources.zero": "resources.zero=3",
    "Resources.micro_tokens": "resources.micro_tokens=64", "Resources.eval_batch": "resources.eval_batch=3",
    "Resources.checkpoint_steps": "resources.checkpoint_steps=1", "Resources.lanes": "resources.lanes=3",
    "Resources.activation_checkpointing": "resources.activation_checkpointing=true",
    "Encoder.shape": "encoders.weak.shape={embed_dim: 1, vision_cfg: {image_size: 32, patch_size: 8, width: 64, layers: 1}}",
    "Resources.gpus_per_worker": "resources.gpus_per_worker=1", "Resources.device": "resources.device=cuda",
    "Resources.cpus": "resources.cpus=4",
    "Resources.object_store_mb": "resources.object_store_mb=100",
}  # fmt: skip


TOWER = "encoders.weak={checkpoint: some/where, image: {size: 32, patch: 8}}"
OF_TOWER = {"Image.size": "encoders.weak.image.size=64", "Image.patch": "encoders.weak.image.patch=16"}
"""Beside a tower whose own numbers the profile doesn't say: it would have to agree with them."""


def identities(tmp_path, *sets: str) -> list[str]:
    extra = PROFILE[PROFILE.index("  miner:\n") : PROFILE.index("llms:\n")].replace("miner:", "fourth:").replace("seed: 3", "seed: 4")
    files = write(
        tmp_path,
        changed(STUDY, "controls: {arms: [first]}", "controls: {arms: [first], seed: 0}"),
        changed(PROFILE, "llms:\n", extra + "llms:\n"),
    )
    return [stage["id"] for stage in make_plan(files[0], profile=files[1], sets=["assumptions=[]", *sets])["stages"]]


@pytest.fixture
def before(tmp_path):
    return identities(tmp_path)


@pytest.mark.parametrize("field", CHANGES)
def test_what_can_change_a_result_changes_identities(field, tmp_path, before):
    assert CLASSES[field] == IDENTITY
    assert set(identities(tmp_path, CHANGES[field])) != set(before)


@pytest.mark.parametrize("field", [*OF_ELDER, *OF_BRIDGE])
def test_what_can_change_a_result_of_released_weights_changes_identities(field, tmp_path):
    assert CLASSES[field] == IDENTITY
    first = "recipe.model=elder" if field in OF_ELDER else "axes.updating.full.init=rivals-connector"
    start = [first, *(["connectors.rivals-connector={checkpoint: a/b}"] if field in OF_BRIDGE else [])]
    assert set(identities(tmp_path, first, (OF_ELDER | OF_BRIDGE)[field])) != set(identities(tmp_path, *start))


@pytest.mark.parametrize("field", OF_ADAPTERS)
def test_what_can_change_adapters_changes_identities(field, tmp_path):
    assert CLASSES[field] == IDENTITY
    assert set(identities(tmp_path, OF_ADAPTERS[field])) != set(identities(tmp_path, "recipe.finetune.adapters={llm: {}}"))


@pytest.mark.parametrize("field", KEEPS)
def test_what_can_not_change_a_result_keeps_identities(field, tmp_path, before):
    assert CLASSES[field] == RUNTIME
    assert identities(tmp_path, KEEPS[field]) == before


@pytest.mark.parametrize("field", OF_TOWER)
def test_what_can_change_the_pixels_of_a_released_tower_changes_identities(field, tmp_path):
    assert CLASSES[field] == IDENTITY
    assert set(identities(tmp_path, TOWER, OF_TOWER[field])) != set(identities(tmp_path, TOWER))


def test_a_profile_under_another_name_keeps_identities(tmp_path, before, monkeypatch):
    assert CLASSES["Profile.profile"] == RUNTIME
    monkeypatch.setitem(globals(), "PROFILE", changed(PROFILE, "profile: small", "profile: other"))
    assert identities(tmp_path) == before


def test_every_identity_field_is_tried():
    tried = {*CHANGES, *OF_ELDER, *OF_BRIDGE, *OF_ADAPTERS, *OF_TOWER, *ONE_VALUE}
    assert {field for field, kind in CLASSES.items() if kind == IDENTITY} == tried


def test_the_spec_decides_and_its_spelling_does_not():
    one = identity.stage_id("train", {"a": 1, "b": {"c": 2.0, "d": [1e-3]}})
    assert one == identity.stage_id("train", {"b": {"d": [0.001], "c": 2}, "a": 1.0})
    assert one != identity.stage_id("train", {"a": 1, "b": {"c": 2, "d": [2e-3]}})
    assert one != identity.stage_id("score", {"a": 1, "b": {"c": 2, "d": [1e-3]}})
    assert one.startswith("train-") and len(one) == len("train-") + 12


def test_a_new_identity_version_is_a_new_identity(monkeypatch):
    one = identity.stage_id("train", {"a": 1})
    monkeypatch.setattr(identity, "IDENTITY_VERSION", identity.IDENTITY_VERSION + 1)
    assert identity.stage_id("train", {"a": 1}) != one
