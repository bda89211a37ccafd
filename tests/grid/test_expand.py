"""Products, zips, seeds and single arms; what an axis value sets."""

from __future__ import annotations

from grid.load import load
from tests.grid.studies import STUDY, changed, write


def arms(tmp_path, entries: str, **more):
    start, end = STUDY.index("arms:\n"), STUDY.index("references:")
    study = (STUDY[:start] + "arms:\n" + entries + STUDY[end:]).replace("controls: {arms: [first]}\n", "")
    return [arm for arm in load(*write(tmp_path, study), **more).arms if arm.source == "trained"]


def test_a_product_is_every_combination_in_stable_order(tmp_path):
    made = arms(tmp_path, "  - {product: {encoder: [weak, strong], llm: [talker, thinker]}}\n")
    assert [arm.name for arm in made] == ["weak-talker", "weak-thinker", "strong-talker", "strong-thinker"]
    assert [(arm.recipe.encoder, arm.recipe.llm) for arm in made] == [tuple(arm.name.split("-")) for arm in made]
    assert all(arm.axes["pretraining"] == "short" for arm in made)


def test_a_zip_goes_side_by_side(tmp_path):
    made = arms(tmp_path, "  - {zip: {encoder: [weak, strong], llm: [thinker, talker]}, name: '{llm}.{encoder}'}\n")
    assert [arm.name for arm in made] == ["thinker.weak", "talker.strong"]


def test_zip_times_product_times_seeds(tmp_path):
    entry = "  - {zip: {encoder: [weak, strong], llm: [talker, thinker]}, product: {updating: [connector, full]}, seeds: [1, 2]}\n"
    made = arms(tmp_path, entry)
    assert [arm.name for arm in made][:5] == [
        "weak-talker-connector-s1",
        "weak-talker-connector-s2",
        "weak-talker-full-s1",
        "weak-talker-full-s2",
        "strong-thinker-connector-s1",
    ]
    assert len(made) == 8 and [arm.recipe.seed for arm in made] == [1, 2] * 4


def test_one_axis_value_sets_several_keys_together(tmp_path):
    study = changed(
        STUDY,
        "    short: {pretrain.data: captions}",
        "    short: {pretrain.data: captions, pretrain.batch: 16, seed: 77, connector.depth: 1}",
    )
    made = load(*write(tmp_path, study)).arms
    assert all((arm.recipe.pretrain.batch, arm.recipe.seed, arm.recipe.connector.depth) == (16, 77, 1) for arm in made if not arm.released)


def test_an_arm_is_its_diff_from_the_base(tmp_path):
    base, other = arms(tmp_path, "  - {name: base}\n  - {name: other, set: {finetune.batch: 2, connector: {builder: linear}}}\n")
    assert base.axes == other.axes and base.recipe.pretrain is other.recipe.pretrain
    assert (base.recipe.finetune.batch, other.recipe.finetune.batch) == (4, 2)
    assert (base.recipe.connector.builder, other.recipe.connector.builder) == ("mlp", "linear")
    assert base.changes == {} and other.changes == {"finetune.batch": 2, "connector": {"builder": "linear"}}


def test_arms_can_be_chosen_by_glob(tmp_path):
    entries = "  - {product: {encoder: [weak, strong], llm: [talker, thinker]}}\n"
    assert [arm.name for arm in arms(tmp_path, entries, arms=["strong-*", "*-thinker"])] == [
        "weak-thinker",
        "strong-talker",
        "strong-thinker",
    ]


def test_a_stand_in_has_its_references_axes_and_its_own_keys(tmp_path):
    rival = next(arm for arm in load(*write(tmp_path)).arms if arm.released)
    assert rival.stands_in and rival.recipe.seed == 9 and rival.axes["encoder"] == "weak"
