"""Never twice: another study that shares stages with an earlier one plans the same identities, and on a shared store doesn't make them."""

from __future__ import annotations

import time

from grid.ledger import LedgerCore
from grid.plan import make_plan
from grid.rundir import RunDirectory
from grid.session import Session
from grid.settings import Settings
from tests.grid.studies import PROFILE, STUDY, changed, write
from tests.grid.toy_plan import plan, stage
from trainers.store import Owner, Store


def test_a_study_of_other_finetuning_data_plans_the_same_pretrainings(tmp_path):
    def pretrainings(study, profile=PROFILE):
        (tmp_path / "study").mkdir(exist_ok=True)
        made = make_plan(write(tmp_path / "study", study, profile)[0], profile=str(tmp_path / "study" / "profile.yaml"))
        return made, {s["id"] for s in made["stages"] if s["name"].startswith(("pretrain", "encoder", "llm"))}

    first, known = pretrainings(STUDY)
    second, again = pretrainings(
        changed(changed(STUDY, "study: small", "study: other"), "    data: chats\n", "    data: talks\n"),
        changed(PROFILE, "  words: {", "  talks: {source: specimens, keys: {part: instructions, rows: 44}, tokens: 40}\n  words: {"),
    )
    assert known == again and len(known) >= 6
    tuned = [{s["id"] for s in made["stages"] if s["name"].startswith("finetune")} for made in (first, second)]
    assert len(tuned[0]) == len(tuned[1]) and not tuned[0] & tuned[1]


def test_a_study_on_a_shared_store_makes_only_what_no_other_made(tmp_path):
    def study(tuning):
        stages = [stage("base"), stage("pretrain", ["base"]), stage(tuning, ["pretrain"]), stage(f"score-{tuning}", [tuning])]
        return plan(stages, {"arm": [one["id"] for one in stages]}, store=str(tmp_path / "store"))

    store = Store(tmp_path / "store")
    for id in ("base", "pretrain", "tune-a", "score-tune-a"):
        lease = store.acquire(id, Owner.here("first study", 1))
        (lease.out / "value.json").write_text("1")
        lease.commit({}, 1.0)
    (store.path("base") / "value.json").write_text("cut off, and so of another size")
    second = study("tune-b")
    directory = RunDirectory.open(tmp_path / "out", "toys", False, ["run"])
    try:
        session = Session(second, Settings.read(second["run"]), directory, ["run"], time.time())
        done = session._finished()
    finally:
        directory.close()
    assert done == ["pretrain"], "a damaged one is made again"
    ledger = LedgerCore(second, done, tmp_path / "ledger")
    ledger.lane_up("lane-0", 1)
    made = []
    while grant := ledger.claim("lane-0"):
        made.append(grant["stage"]["id"])
        ledger.finish("lane-0", made[-1], {})
    assert sorted(made) == ["base", "score-tune-b", "tune-b"] and ledger.arm("arm")["state"] == "done"
