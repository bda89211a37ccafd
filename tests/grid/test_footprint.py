"""The memory plan: devices by name, bytes that follow ZeRO's table, and the fastest setting that fits each of the house's machines."""

from __future__ import annotations

import pytest

from datasets_ray.errors import UserError, UserErrors
from grid import devices, fit, shapes
from grid.fit import Mix, Room
from grid.footprint import BUCKET, Adapter, Load, decoder_block, footprint, state
from grid.graph import Stage
from grid.plan import make_plan
from tests.grid.studies import write
from tests.grid.test_cost import LLAMA, QWEN2

GIB = 2**30
FULL = {"connector", "llm"}
MIX = Mix(1.0, 0.75, 0.75)


def model(llm: dict = LLAMA) -> tuple[dict, dict[str, int]]:
    encoder = shapes.vision_tower({"image_size": 336, "patch_size": 14, "width": 1024, "layers": 24}, skip=1)
    language = shapes.language_model(llm)
    found = {"encoder": encoder, "connector": shapes.connector(2, encoder.width, language.width), "llm": language}
    return {"family": "vlm", "shapes": found}, {name: shape.params for name, shape in found.items()}


def room(name: str) -> Room:
    _, memory, host = devices.resolve(name, "bf16")
    return Room(2, memory, host, fused=True)


def planned(name: str, world: int, trained: set[str], llm: dict = LLAMA, adapters: dict | None = None, **fixed) -> tuple[dict, dict]:
    """(runtime, GiB by kind) of a stage whose knobs are all `auto` but for `fixed`."""
    runtime = {"world": world, **dict.fromkeys((*fit.KNOBS, "micro_tokens"), "auto"), **fixed}
    spec = {"data": {"max_tokens": 2048}, "batch": 128, "adapters": adapters or {}}
    stage = Stage("x", "train", "x", spec, [], 1, runtime=runtime)
    shape, sizes = model(llm)
    memory = fit.fit(stage, shape, trained, sizes, MIX, room(name))
    return stage.runtime, memory


def test_devices_are_known_by_name():
    assert devices.resolve("A100-40G", "bf16") == devices.resolve("nvidia a100-40gb", "bf16")
    assert devices.resolve("H100", "bf16")[:2] == (989.0, 79.0) and devices.resolve("H200", "fp32")[0] == 67.0
    assert devices.resolve("H200", "bf16", tflops=500.0)[0] == 500.0
    assert devices.resolve("mine", "bf16", 100.0, 24.0) == (100.0, 24.0, 0.0)
    with pytest.raises(UserError, match=r"device 'H20O' without tflops and memory_gib(.|\n)*did you mean 'H200'(.|\n)*or give tflops"):
        devices.resolve("H20O", "bf16")
    assert devices.specs("A100") is None and devices.specs("") is None, "two are called so, and none"


def test_a_profile_names_its_device(tmp_path):
    study, profile = write(tmp_path)
    made = make_plan(study, profile=profile, sets=["device.name=H200", "precision=bf16"])
    assert made["totals"]["device"]["tflops"] == 989 and made["totals"]["device"]["memory_gib"] == 139
    with pytest.raises(UserErrors, match="device.name: device 'abacus' without tflops and memory_gib"):
        make_plan(study, profile=profile, sets=["device.name=abacus"])


def test_what_stays_follows_zero():
    """Rajbhandari et al. 2020, figure 1, with gradients in fp32: 2 + 4 + 12 bytes a parameter, split as the stage says."""
    total, learned, world = 7_000_000_000, 6_700_000_000, 16
    one, two, three = (state(total, learned, 2, world, zero, False) for zero in (1, 2, 3))
    assert [s["weights"] for s in (one, two, three)] == [2 * total, 2 * total, 2 * total / 16]
    assert [s["gradients"] for s in (one, two, three)] == [4 * learned, 4 * learned / 16, 4 * learned / 16]
    assert {s["optimizer"] for s in (one, two, three)} == {12 * learned / 16}
    assert state(total, learned, 2, world, 0, False) == one, "without fp32 accumulation there is no 16-bit training"
    assert state(total, learned, 4, 1, 0, False)["optimizer"] == 8 * learned
    moved = state(total, learned, 2, 1, 2, True)
    assert moved["optimizer"] == 0 and moved["host"] == 18 * learned and moved["gradients"] == 4 * learned
    assert state(total, learned, 2, 1, 3, True)["gradients"] == 0
    assert one["buffers"] == 4 * BUCKET and state(total, learned, 2, 1, 1, False)["buffers"] == 0


def test_a_block_keeps_what_korthikanti_counts():
    """A Llama block at 16 bits, fused: norms 2 x (2 + 2), attention 8, SwiGLU 8 F / D bytes a token and width, and nothing T x T."""
    shape = shapes.language_model(LLAMA)
    tokens = 4096
    whole = decoder_block(shape, Load(tokens, 1), 2, True)
    each = (whole - 4 * tokens * (2 + shape.heads)) / (tokens * shape.width)
    assert each == pytest.approx(8 + 8 + 8 * 11008 / 4096)
    passed = decoder_block(shape, Load(tokens, 1), 2, False)
    assert whole - passed == pytest.approx(tokens * 2 * (2 * shape.width + shape.inner))
    adapted = decoder_block(shape, Load(tokens, 1), 2, True, Adapter(8))
    only = decoder_block(shape, Load(tokens, 1), 2, True, Adapter(8, ["q_proj"]))
    assert passed < only < adapted and passed < whole
    assert adapted - only == tokens * 2 * (shape.width + shape.inner + 6 * 8)
    assert decoder_block(shape, Load(tokens, 1), 2, False, inputs=True) == whole


def test_what_no_gradient_reaches_keeps_nothing():
    shape, sizes = model()
    frozen = footprint(shape, {"encoder"}, sizes, Load(1, 1), width=2)["activations"]
    text = {"family": "causal_lm", "shapes": {"llm": shape["shapes"]["llm"]}}
    assert frozen > 0 and footprint(text, set(), {"llm": 1}, Load(4096, 4096), width=2)["activations"] == 0


def test_memory_falls_with_zero_recomputation_and_offloading():
    shape, sizes = model()
    load = MIX.load(8192)
    totals = [footprint(shape, FULL, sizes, load, width=2, world=16, zero=zero)["total"] for zero in range(4)]
    assert totals == sorted(totals, reverse=True) and totals[0] == totals[1]
    kept, again = (footprint(shape, FULL, sizes, load, width=2, again=mode)["activations"] for mode in (False, True))
    assert again < kept / 8
    here, moved = (footprint(shape, FULL, sizes, load, width=2, zero=2, offload=mode) for mode in (False, True))
    assert here["total"] - moved["total"] == pytest.approx(12 * (sizes["connector"] + sizes["llm"]))
    adapted = footprint(shape, FULL, sizes, load, width=2, adapters={"llm": Adapter(128)})
    assert adapted["optimizer"] == 12 * (sizes["connector"] + Adapter(128).params(shape["shapes"]["llm"]))


@pytest.mark.parametrize("llm", [LLAMA, QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("name, world", [("A100-40GB", 16), ("A100-80GB", 8), ("H100-80GB", 8), ("H200", 1)])
def test_the_houses_machines_train_seven_billions(name, world, llm):
    """Each of the issue's machines finetunes and aligns a 7B; a whole sample fits a micro-batch."""
    for trained in (FULL, {"connector"}):
        runtime, memory = planned(name, world, trained, llm)
        assert room(name).holds(memory, False), (runtime, memory)
        assert runtime["micro_tokens"] >= 2048 and runtime["micro_tokens"] & (runtime["micro_tokens"] - 1) == 0
        assert runtime["zero"] >= 1
        if trained == {"connector"}:
            assert (runtime["zero"], runtime["offload"]) == (1, False)
        else:
            assert runtime["offload"] == (name == "H200" and llm is QWEN2), "one H200 holds 18 bytes of 6.7 G parameters, not of 7.6 G"


def test_adapters_need_no_offloading():
    wanted = {"llm": {"kind": "lora", "rank": 128, "alpha": 256.0, "dropout": 0.0, "targets": "all-linear"}}
    runtime, memory = planned("A100-40GB", 1, FULL, QWEN2, wanted)
    assert not runtime["offload"] and room("A100-40GB").holds(memory, False)
    assert not room("A100-40GB").holds(planned("A100-40GB", 1, FULL, QWEN2)[1], False)


def test_auto_takes_the_fastest_setting_that_fits():
    def chosen(memory_gib: float) -> tuple[int, bool, bool]:
        stage = Stage("x", "train", "x", {"data": {"max_tokens": 2048}, "batch": 128}, [], 1, runtime={
            "world": 16, **dict.fromkeys(fit.KNOBS, "auto"), "micro_tokens": 4096,
        })  # fmt: skip
        shape, sizes = model()
        fit.fit(stage, shape, FULL, sizes, MIX, Room(2, memory_gib, 0.0, True))
        return tuple(stage.runtime[knob] for knob in fit.KNOBS)

    assert chosen(1000) == (1, False, False)
    order = [chosen(memory) for memory in (1000, 100, 60, 40, 24)]
    assert all(a == b or fit.ORDER.index(a) < fit.ORDER.index(b) for a, b in zip(order, order[1:])) and order[-1][0] == 3


def test_what_the_profile_says_stays():
    runtime, memory = planned("H200", 1, FULL, zero=3, offload=True, activation_checkpointing=False, micro_tokens=4096)
    assert (runtime["zero"], runtime["offload"], runtime["activation_checkpointing"], runtime["micro_tokens"]) == (3, True, False, 4096)
    assert memory["host"] == pytest.approx(22 * sum(model()[1][part] for part in FULL) / GIB)


def test_micro_batches_are_powers_of_two_between_a_sample_and_a_ranks_share():
    def sizes(batch: int, world: int, longest: int) -> list[int]:
        spec = {"data": {"max_tokens": longest}, "batch": batch}
        return fit.micro_batches(Stage("x", "train", "x", spec, [], 1, runtime={"world": world}))

    assert sizes(128, 16, 2048) == [16384, 8192, 4096, 2048]
    assert sizes(8, 8, 2000) == [2048] and sizes(1, 8, 3000) == [4096]
    assert sizes(100_000, 1, 2048)[0] == fit.MOST_MICRO


def test_the_plan_settles_every_auto(tmp_path):
    study, profile = write(tmp_path)
    sets = ["resources={zero: auto, activation_checkpointing: auto, offload: auto, micro_tokens: auto}"]
    made = make_plan(study, profile=profile, sets=sets)
    for stage in made["stages"]:
        assert "auto" not in stage["runtime"].values()
        if stage["kind"] == "train":
            assert set(stage["cost"]["memory"]) == {"weights", "gradients", "optimizer", "activations", "workspace", "host", "total"}
    with pytest.raises(UserErrors, match="resources.micro_tokens"):
        make_plan(study, profile=profile, sets=["resources.micro_tokens=some"])
