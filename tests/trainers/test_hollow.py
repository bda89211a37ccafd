"""Hollow models: true sizes through the real modules, example rows of each layout through them, and that what doesn't fit is found."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from datasets_ray import examples
from datasets_ray.errors import UserError
from grid.hollow import Request
from grid.load import load
from grid.plan import plan
from tests.trainers.tiny_models import NATIVE, PATCH, SIZE, qwen2_vl_spec, vlm_spec
from trainers.hollow import Hollow, small_tokenizer

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
IMAGE = {"kind": "square", "size": SIZE, "patch": PATCH, "fit": "pad"}
SETS = {
    "captions": {"source": "llava_json", "file": "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"},
    "mix": {"source": "llava_json", "file": "llava_v1_5_mix665k.json", "expect": 665298},
    "pixmo": {"source": "pixmo", "part": "caption"},
    "imagenet": {"source": "imagenet_annotated", "k": 5, "seed": 0},
    "flowers": {"source": "flowers102", "part": "labelled", "split": "test"},
    "pets": {"source": "pets", "part": "labelled", "split": "test"},
    "food": {"source": "food101", "part": "labelled", "split": "test"},
    "mmbench": {"source": "vlmevalkit_tsv", "file": "MMBench_DEV_EN.tsv", "circular": True},
    "mmmu": {"source": "vlmevalkit_tsv", "file": "MMMU_DEV_VAL.tsv", "split": "validation", "most_images": 1},
}


def request(**changes) -> dict:
    """A small LLaVA, a small Qwen2-VL and a CLIP, and ways through them for every layout of data."""
    clip = {"family": "clip", "parts": {"encoder": vlm_spec()["parts"]["encoder"]}}
    models = {
        "llava": {"spec": vlm_spec("llama"), "image": IMAGE},
        "qwen": {"spec": {**vlm_spec("qwen2"), "tokenizer": "Qwen/Qwen2-7B"}, "image": IMAGE},
        "native": {"spec": {**qwen2_vl_spec(), "tokenizer": None}, "image": NATIVE},
        "clip": {"spec": clip, "image": {**IMAGE, "fit": "crop"}},
    }
    learn = {"max_tokens": 2048, "objective": {"name": "next_token"}}
    walks = [
        {"name": f"{data}, {model}", "id": "x", "model": model, "data": data, "image": image, "template": template, **learn}
        for model, image, template in (("llava", IMAGE, "vicuna_v1"), ("qwen", IMAGE, "chatml"), ("native", NATIVE, "chatml"))
        for data in ("captions", "mix", "pixmo")
    ]
    asked = [
        {"name": f"{data}, {model}", "id": "y", "model": model, "data": data, "image": image, "template": template, "suffix": "Answer."}
        for model, image, template in (("llava", IMAGE, "vicuna_v1"), ("native", NATIVE, "chatml"))
        for data in ("imagenet", "mmbench", "mmmu")
    ]
    seen = [
        {"name": data, "id": "z", "model": "clip", "data": data, "image": models["clip"]["image"]} for data in ("flowers", "pets", "food")
    ]
    trainings = [{"id": "t", "name": "finetune", "model": "llava", "phases": [["connector"], ["connector", "llm"]], "adapters": None}]
    made = {"models": models, "trainings": trainings, "sets": copy.deepcopy(SETS), "walks": walks, "asked": asked, "seen": seen}
    return {**made, **changes}


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    return Hollow(request(), tmp_path_factory.mktemp("hollow")).run()


def test_every_layout_passes_its_reader_its_template_and_the_models(answer):
    assert answer["failures"] == [] and answer["notes"] == []
    assert len(answer["walks"]) == 9 + 6 + 3
    counts = {walk["name"]: walk for walk in answer["walks"]}
    assert counts["captions, llava"]["rows"] == counts["captions, llava"]["images"] == examples.COUNT
    assert counts["mix, llava"]["rows"] == examples.COUNT and counts["mix, llava"]["images"] < examples.COUNT  # some rows are text only
    assert counts["mix, llava"]["learned"] > 0 and counts["mix, llava"]["tokens"] > counts["mix, llava"]["learned"]
    assert counts["mmbench, llava"]["rows"] > examples.COUNT  # each question once a rotation
    assert counts["mix, native"]["tokens"] != counts["mix, qwen"]["tokens"]  # native images take as many tokens as they are large
    assert counts["flowers"]["images"] == examples.COUNT


def test_sizes_are_the_modules_own_and_phases_train_what_they_say(answer):
    first, second = answer["trainings"]["t"]["phases"]
    sizes = answer["models"]["llava"]
    assert first == {"encoder": 0, "connector": sizes["connector"], "llm": 0}
    assert second == {"encoder": 0, "connector": sizes["connector"], "llm": sizes["llm"]}
    assert answer["trainings"]["t"] == {
        "phases": [first, second], "total": sum(sizes.values()), "learned": sizes["connector"] + sizes["llm"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda made: made["walks"][1].update(max_tokens=24), "mix, llava: rows of its example don't pass"),
        (lambda made: made["walks"][1].update(image={**IMAGE, "size": 2 * SIZE}), "mix, llava: "),
        (lambda made: made["walks"][0].update(template="chatml"), "captions, llava: template 'chatml' needs"),
        (lambda made: made["sets"]["mix"].update(fyle="x"), "has no key 'fyle'"),
        (
            lambda made: made["models"]["qwen"]["spec"]["parts"]["llm"]["config"].update(model_type="nonsense"),
            "model qwen: no language model of type",
        ),
        (lambda made: made["trainings"][0].update(phases=[["conector"]]), "finetune: no part 'conector'"),
        (lambda made: made["asked"][0].update(template="plain"), "imagenet, llava: template 'plain' can't ask"),
    ],
)
def test_what_does_not_fit_is_told_and_the_rest_goes_on(change, told, tmp_path):
    made = request()
    made["models"] = copy.deepcopy(made["models"])
    change(made)
    answer = Hollow(made, tmp_path).run()
    assert any(told in failure for failure in answer["failures"]), answer["failures"]
    assert len(answer["walks"]) >= 9


def test_a_layout_without_example_is_noted(tmp_path):
    answer = Hollow(request(sets={"cub": {"source": "cub", "part": "labelled"}}, walks=[], asked=[], seen=[]), tmp_path).run()
    assert answer["notes"] == ["no example of the layout of 'cub': cub was not walked"] and not answer["failures"]


def test_the_four_connectors_between_released_encoders_and_language_models(tmp_path):
    """Published shapes through the real modules: CLIP-L or DFN-H to Llama/Vicuna or Qwen2."""
    request = Request(
        plan(load(EXPERIMENTS / "full_ablation.yaml", "cluster")), load(EXPERIMENTS / "full_ablation.yaml", "cluster").profile
    )
    hollow = Hollow({**request.json(), "sets": {}, "walks": [], "asked": [], "seen": []}, tmp_path)
    answer = hollow.run()
    assert answer["failures"] == []
    sizes = [sizes for sizes in answer["models"].values() if "connector" in sizes]
    connectors = {(s["encoder"], s["llm"]): s["connector"] for s in sizes}
    clip, dfn, llama, qwen2 = 290_909_184, 611_691_520, 6_738_415_616, 7_615_616_512
    assert connectors[clip, llama] == 20_979_712 and connectors[clip, qwen2] == 16_522_240
    assert connectors[dfn, llama] == 22_028_288 and connectors[dfn, qwen2] == 17_439_744
    whole = [sizes["encoder"] for sizes in answer["models"].values() if set(sizes) == {"encoder"}]
    assert 427_944_193 in whole  # CLIP ViT-L/14@336, both towers
    assert all(parameter.device == torch.device("meta") for model in hollow.built.values() for parameter in model.parameters())


def test_the_profiles_shapes_are_the_libraries_own():
    """What cluster.yaml says of CLIPs is what open_clip knows under their names."""
    import open_clip

    encoders = load(EXPERIMENTS / "full_ablation.yaml", "cluster").profile.encoders
    names = {
        "clip-vit-l-14-336": "ViT-L-14-336-quickgelu",
        "dfn-clip-vit-h-14-378": "ViT-H-14-378-quickgelu",
        "openclip-vit-l-14-laion": "ViT-L-14",
    }
    assert set(names) <= set(encoders)
    for ours, theirs in names.items():
        assert encoders[ours].shape == open_clip.get_model_config(theirs)


def test_the_tokenizer_is_of_the_models_kind():
    assert small_tokenizer(vlm_spec("llama")) == "tiny-llama"
    assert small_tokenizer({**vlm_spec("qwen2"), "tokenizer": "Qwen/Qwen2-7B"}) == "tiny-qwen2"
    assert small_tokenizer({**qwen2_vl_spec(), "tokenizer": "Qwen/Qwen2-VL-7B"}) == "tiny-qwen2"


def test_examples_are_the_same_each_time_and_need_a_known_layout(tmp_path):
    for name in ("one", "two"):
        assert all(examples.write(spec, tmp_path / name) for spec in SETS.values())
    first, second = (
        {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("one", "two")
    )
    different = [path for path in first if first[path] != second[path] and not path.endswith(".mat")]  # MATLAB files hold the time
    assert first.keys() == second.keys() and not different
    assert not examples.write({"source": "cub"}, tmp_path)
    with pytest.raises(UserError, match="only sources have examples"):
        from trainers.hollow import _none

        _none("x")
