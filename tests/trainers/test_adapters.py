"""Low-rank adapters: nothing changes until they learn, only they learn, a resumed stage ends with the same bits, and what is left behind is
a plain part that computes what the adapted one did, with the adapters beside it as peft reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from datasets_ray.errors import UserError, UserErrors
from grid.plan import make_plan
from tests.grid.studies import STUDY, changed, write
from tests.trainers import training_kit as kit
from trainers import adapters, models, train
from trainers.context import Context, Interrupted
from trainers.models.language import causal_lm

LORA = {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear"}
STEPS = 8
PHASES = [{"until": 1.0, "learning_rates": {"connector": 3e-3, "llm": 1e-2}}]


def spec(**changes):
    return kit.train_spec(steps=STEPS, adapters={"llm": LORA}, phases=PHASES, **changes)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return kit.write_captions(tmp_path_factory.mktemp("rows"), 40)


@pytest.fixture(scope="module")
def finished(rows, tmp_path_factory) -> tuple[dict, Path]:
    """(summary, folder) of a LoRA stage in one go."""
    folder = tmp_path_factory.mktemp("whole")
    return train.run(spec(), kit.context(folder, rows)), folder


def built(folder: Path, model_spec: dict, inputs: dict[str, Path] | None = None):
    return models.build(model_spec, Context.local(folder, {"id": "x", "spec": {}}, inputs))


def ids() -> torch.Tensor:
    return torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(0))


def hidden(module: torch.nn.Module) -> torch.Tensor:
    """Hidden states of a language model over one segment."""
    from trainers.models.attention import Segments

    tokens = ids()
    with torch.no_grad():
        return module.base_model(input_ids=tokens, use_cache=False, packing=Segments([tokens.shape[1]])).last_hidden_state


def test_nothing_changes_until_they_learn_and_only_they_learn(tmp_path):
    model = kit.vlm(tmp_path)
    before = hidden(model.parts["llm"])
    adapters.attach(model, {"llm": LORA}, 0)
    assert torch.equal(hidden(model.parts["llm"]), before)
    models.train_parts(model, {"connector", "llm"})
    adapters.freeze_rest(model)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in learning if ".lora_" not in name} == {n for n, _ in model.named_parameters() if ".connector." in n}
    maps = [name for name, _ in adapters.layers(model.parts["llm"])]
    assert len(maps) == 2 * 7 and not any("lm_head" in name for name in maps)
    assert len([name for name in learning if ".lora_" in name]) == 2 * len(maps)
    models.train_parts(model, {"connector"})
    adapters.freeze_rest(model)
    assert not any(p.requires_grad for p in model.parts["llm"].parameters())


def test_the_seed_alone_decides_how_they_begin(tmp_path):
    def first(seed: int) -> torch.Tensor:
        model = kit.vlm(tmp_path)
        torch.rand(seed + 1)
        state = torch.get_rng_state()
        adapters.attach(model, {"llm": LORA}, seed)
        assert torch.equal(torch.get_rng_state(), state)
        return next(adapters.layers(model.parts["llm"]))[1].lora_A["default"].weight

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_a_stage_leaves_a_plain_part_and_its_adapters(finished, tmp_path):
    summary, folder = finished
    out = folder / "out"
    beside = {"adapters/llm/adapter_model.safetensors", "adapters/llm/adapter_config.json"}
    assert set(summary["sha256"]) == {"connector.safetensors", "llm.safetensors", *beside}
    assert summary["loss"]["last"] < summary["loss"]["first"]
    trained = {row["part"]: row["trainable"] for row in summary["frozen"]}
    low = 4 * sum(2 * (i + o) for i, o in [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)])
    assert trained["llm"] == low and trained["encoder"] == 0
    after = json.loads((out / "model.json").read_text())
    plain = built(tmp_path / "after", after, {"train-test": out})
    first = built(tmp_path / "before", spec()["model"])
    names = set(load_file(str(out / "llm.safetensors")))
    assert not any("lora" in name or "base_layer" in name for name in names)
    moved = {n for (n, a), b in zip(plain.parts["llm"].named_parameters(), first.parts["llm"].parameters()) if not torch.equal(a, b)}
    assert moved == {n for n, _ in plain.parts["llm"].named_parameters() if n.endswith("_proj.weight")}
    # peft's own reader over the weights that the stage began with
    base = causal_lm(spec()["model"]["parts"]["llm"]["config"])
    base.load_state_dict(first.parts["llm"].state_dict())
    adapted = PeftModel.from_pretrained(base, str(out / "adapters" / "llm"))
    assert torch.allclose(hidden(adapted.base_model.model), hidden(plain.parts["llm"]), atol=1e-5)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_resuming_is_never_having_stopped(tmp_path, rows, finished, zero):
    more = {"zero": zero}
    whole = finished[0] if zero == 0 else train.run(spec(), kit.context(tmp_path / "whole", rows, **more))
    ctx = kit.context(tmp_path, rows, **more)
    ctx.stopping = lambda done: done == 3
    with pytest.raises(Interrupted):
        train.run(spec(), ctx)
    kept = load_file(str(tmp_path / "work" / "step-00000003" / "rank-00000.safetensors"))
    assert {key.split("|")[1].split(".")[1] for key in kept if not key.startswith("rng")} == {"connector", "llm"}
    assert all(".lora_" in key for key in kept if ".llm." in key), "base weights are never written"
    resumed = train.run(spec(), kit.context(tmp_path, rows, **more))
    assert resumed["sha256"] == whole["sha256"] and resumed["loss"] == whole["loss"]
    assert whole["loss"]["last"] == pytest.approx(finished[0]["loss"]["last"], rel=1e-4)


def test_merging_rounds_once_and_adds_in_fp32(tmp_path):
    model = kit.vlm(tmp_path).to(torch.bfloat16)
    adapters.attach(model, {"llm": {**LORA, "targets": ["q_proj"]}}, 0)
    (name, layer), *others = adapters.layers(model.parts["llm"])
    assert name.endswith("q_proj") and len(others) == 1
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    low, high, base = (
        w.detach().double() for w in (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight)
    )
    files = adapters.merge(model.parts["llm"], tmp_path / "adapters")
    assert [file.name for file in files] == ["adapter_model.safetensors", "adapter_config.json"]
    merged = model.parts["llm"].get_submodule(name).weight
    assert torch.equal(merged, (base + 2.0 * high @ low).to(torch.bfloat16))
    assert not list(adapters.layers(model.parts["llm"])) and adapters.merge(model.parts["llm"], tmp_path / "again") == []


def test_mistakes(tmp_path):
    model = kit.vlm(tmp_path)
    mistakes = {
        "part 'lm'.*did you mean 'llm'": {"lm": LORA},
        "adapter dropout 0.05.*micro-batch": {"llm": {**LORA, "dropout": 0.05}},
        "no linear map 'k_prod'.*did you mean 'k_proj'": {"llm": {**LORA, "targets": ["q_proj", "k_prod"]}},
        "unknown adapter 'qlora'": {"llm": {**LORA, "kind": "qlora"}},
    }
    for said, wanted in mistakes.items():
        with pytest.raises(UserError, match=f"(?s){said}"):
            adapters.attach(model, wanted, 0)


def test_a_study_asks_for_them_and_says_what_is_wrong(tmp_path):
    sets = ["recipe.finetune.adapters={llm: {rank: 8, alpha: 16}}"]
    study, profile = write(tmp_path)
    made, plain = make_plan(study, profile=profile, sets=sets), make_plan(study, profile=profile)
    tuned = next(stage for stage in made["stages"] if stage["name"].startswith("finetune"))
    assert tuned["spec"]["adapters"] == {"llm": {"kind": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": "all-linear"}}
    same = next(stage for stage in plain["stages"] if stage["name"] == tuned["name"])
    assert "adapters" not in same["spec"] and tuned["id"] != same["id"]
    assert tuned["cost"]["learned"]["llm"] == 2 * 8 * (4 * 64 + 3 * 96) and same["cost"]["learned"]["llm"] > tuned["cost"]["learned"]["llm"]
    wrong = {
        "finetune.adapters.llm.dropout: 0.05 can't be": "{llm: {dropout: 0.05}}",
        "unknown part for adapters 'encoder'": "{encoder: {rank: 8}}",
        "finetune.adapters.llm.rank: 0 is impossible": "{llm: {rank: 0}}",
        "finetune.adapters.llm.kind: 'qlora' is not a choice": "{llm: {kind: qlora}}",
    }
    for said, value in wrong.items():
        with pytest.raises(UserErrors) as raised:
            make_plan(study, profile=profile, sets=[f"recipe.finetune.adapters={value}"])
        assert said in str(raised.value)
    phases = "    phases: [{until: 1.0, learning_rates: {connector: 1e-3%s}}]\ntemplates"
    write(tmp_path, changed(STUDY, phases % ", llm: 1e-3", phases % ""))
    with pytest.raises(UserErrors, match="adapters.llm: no phase trains llm"):
        make_plan(study, profile=profile, sets=sets)
