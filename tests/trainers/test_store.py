"""Laws of the artefact store: whole or not at all, one writer at a time, nothing from a writer whose time is over."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from trainers import store as store_module
from trainers.context import LeaseLost
from trainers.store import Damaged, LeaseBusy, Owner, Store, process_birth

STAGE = "train-0123456789ab"


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def owner(run="run-a", epoch=1, host="elsewhere", pid=7, born="1"):
    """An owner on another host by default: whether its process lives can't be seen from here."""
    return Owner(run, epoch, host, pid, born)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    return Store(tmp_path / "store", clock)


def fill(lease, text="weights"):
    (lease.out / "sub").mkdir()
    (lease.out / "llm.safetensors").write_text(text)
    (lease.out / "sub" / "more.json").write_text("{}")


def test_an_artefact_appears_whole_with_its_digests(store):
    lease = store.acquire(STAGE, owner())
    fill(lease)
    assert not store.done(STAGE) and not store.path(STAGE).exists()
    lease.commit({"loss": 1.5}, seconds=2.0)
    assert store.done(STAGE)
    done = store.read_done(STAGE)
    assert done["summary"] == {"loss": 1.5} and set(done["files"]) == {"llm.safetensors", "sub/more.json"}
    assert done["files"]["llm.safetensors"]["bytes"] == 7
    store.verify(STAGE, digests=True)
    assert not lease.out.exists() and not lease.work.exists()


def test_the_same_size_with_other_bytes_is_found_by_digest_and_another_size_at_once(store):
    lease = store.acquire(STAGE, owner())
    fill(lease)
    lease.commit({}, 0.0)
    (store.path(STAGE) / "llm.safetensors").write_text("weightz")
    store.verify(STAGE)
    with pytest.raises(Damaged, match="SHA-256"):
        store.reuse(STAGE)
    (store.path(STAGE) / "llm.safetensors").write_text("w")
    with pytest.raises(Damaged, match="1 bytes"):
        store.verify(STAGE)
    (store.path(STAGE) / "llm.safetensors").unlink()
    with pytest.raises(Damaged, match="missing"):
        store.verify(STAGE)
    store.discard(STAGE)
    assert not store.done(STAGE)


def test_a_directory_without_its_marker_is_not_done_and_is_replaced(store):
    store.path(STAGE).mkdir(parents=True)
    (store.path(STAGE) / "half.bin").write_text("torn")
    assert not store.done(STAGE)
    lease = store.acquire(STAGE, owner())
    fill(lease)
    lease.commit({}, 0.0)
    assert store.done(STAGE) and not (store.path(STAGE) / "half.bin").exists()
    store.verify(STAGE, digests=True)


def test_a_torn_marker_is_damage(store):
    lease = store.acquire(STAGE, owner())
    fill(lease)
    lease.commit({}, 0.0)
    (store.path(STAGE) / "DONE.json").write_text('{"files": {')
    with pytest.raises(Damaged, match="unreadable"):
        store.verify(STAGE)


def test_what_is_left_of_a_killed_driver_can_neither_commit_nor_checkpoint_nor_append(store, tmp_path):
    stale = store.acquire(STAGE, owner(epoch=1))
    fill(stale, "stale")
    (stale.work / "step-10").mkdir()
    (stale.work / "step-10" / "state").write_text("checkpoint")
    metrics = tmp_path / "metrics.jsonl"
    stale.append(metrics, json.dumps({"step": 1}))

    fresh = store.acquire(STAGE, owner(epoch=2))
    assert fresh.token > stale.token
    assert (fresh.work / "step-10" / "state").read_text() == "checkpoint", "the new attempt goes on from the old one's checkpoint"

    for forbidden in (stale.guard, stale.renew, lambda: stale.append(metrics, "{}")):
        with pytest.raises(LeaseLost):
            forbidden()
    with pytest.raises(OSError):
        (stale.work / "step-20").mkdir()
    with pytest.raises(OSError):
        (stale.out / "late.bin").write_text("late")
    with pytest.raises((LeaseLost, OSError)):
        stale.commit({}, 0.0)
    stale.release()  # gives back nothing that is not its own
    fresh.guard()
    fill(fresh, "fresh")
    fresh.commit({}, 0.0)
    assert (store.path(STAGE) / "llm.safetensors").read_text() == "fresh"
    assert len(metrics.read_text().splitlines()) == 1


def test_a_stale_writer_that_makes_its_folders_anew_still_cannot_commit(store):
    stale = store.acquire(STAGE, owner(epoch=1))
    fresh = store.acquire(STAGE, owner(epoch=2))
    stale.work.mkdir(parents=True)
    (stale.work / "bad").write_text("bad")
    stale.out.mkdir(parents=True)
    fill(stale, "stale")
    with pytest.raises(LeaseLost):
        stale.commit({}, 0.0)
    third = store.acquire(STAGE, owner(epoch=3))
    assert not (third.work / "bad").exists(), "the newest token's checkpoints are taken over, not the stale one's"
    assert not store.done(STAGE) and fresh.token < third.token


def test_an_older_driver_of_the_run_is_turned_away(store):
    store.acquire(STAGE, owner(epoch=3))
    with pytest.raises(LeaseLost):
        store.acquire(STAGE, owner(epoch=2))


def test_another_live_run_makes_us_wait_until_its_lease_expires(store, clock):
    theirs = store.acquire(STAGE, owner("run-b"), seconds=60)
    with pytest.raises(LeaseBusy) as busy:
        store.acquire(STAGE, owner("run-a"))
    assert "run-b" in str(busy.value) and busy.value.seconds == 60
    clock.now += 50
    theirs.renew()
    clock.now += 50
    with pytest.raises(LeaseBusy):
        store.acquire(STAGE, owner("run-a"))
    clock.now += 11
    ours = store.acquire(STAGE, owner("run-a"))
    with pytest.raises(LeaseLost):
        theirs.renew()
    ours.guard()


def test_a_lease_given_back_is_free_at_once_and_tokens_never_repeat(store):
    first = store.acquire(STAGE, owner("run-b"))
    first.release()
    second = store.acquire(STAGE, owner("run-a"))
    assert second.token == first.token + 1
    fill(second)
    second.commit({}, 0.0)
    store.discard(STAGE)
    assert store.acquire(STAGE, owner("run-b")).token == second.token + 1


def test_an_artefact_thrown_away_twice_ends_no_lease_of_whoever_makes_it_anew(store):
    first = store.acquire(STAGE, owner("run-b"))
    fill(first)
    first.commit({}, 0.0)
    store.discard(STAGE)  # two runs found it damaged: this one makes it anew,
    again = store.acquire(STAGE, owner("run-a"))
    store.discard(STAGE)  # and that one comes later
    with pytest.raises(LeaseBusy, match="run-a"):
        store.acquire(STAGE, owner("run-b"))
    again.guard()
    fill(again)
    again.commit({}, 0.0)
    store.verify(STAGE, digests=True)


def test_a_dead_process_of_this_host_holds_nothing(store):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    here = Owner.here("run-b", 1)
    store.acquire(STAGE, Owner("run-b", 1, here.host, child.pid, process_birth(child.pid)))
    with pytest.raises(LeaseBusy):
        store.acquire(STAGE, Owner.here("run-a", 1))
    child.kill()
    child.wait()
    store.acquire(STAGE, Owner.here("run-a", 1)).guard()


def test_a_process_id_used_again_is_not_the_old_process():
    assert process_birth(os.getpid()) not in {"", "1"}
    assert not process_birth(2**22 + 1)


def test_an_append_after_a_torn_line_starts_a_line_of_its_own(store, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"st')
    store.acquire(STAGE, owner()).append(metrics, '{"step": 2}')
    assert metrics.read_text().splitlines() == ['{"step": 1}', '{"st', '{"step": 2}']


def test_metrics_lie_beside_the_digests_not_among_them(store, tmp_path):
    lease = store.acquire(STAGE, owner())
    fill(lease)
    metrics = tmp_path / "m.jsonl"
    lease.append(metrics, '{"step": 1}')
    done = lease.commit({}, 0.0, metrics)
    assert "metrics.jsonl" not in done["files"] and (store.path(STAGE) / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("after", [0.0, 0.02, 0.05, 0.1])
def test_a_commit_killed_anywhere_leaves_all_or_nothing(tmp_path, after):
    """A process commits artefact after artefact until it is killed; each of them is then whole or absent."""
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
from trainers.store import Owner, Store
store = Store({str(tmp_path)!r})
print("ready", flush=True)
for i in range(10000):
    lease = store.acquire(f"s-{{i}}", Owner.here("r", 1))
    (lease.out / "a").write_bytes(b"x" * 50000)
    lease.commit({{"i": i}}, 0.0)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert child.stdout.readline().strip() == b"ready"
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(after + 0.05)
    child.kill()
    child.wait()
    store = Store(tmp_path)
    present = [path.name for path in tmp_path.iterdir() if path.name.startswith("s-")]
    for name in present:
        store.verify(name, digests=True)
    following = store.acquire(f"s-{len(present)}", Owner.here("r", 2))
    (following.out / "a").write_bytes(b"y")
    following.commit({}, 0.0)
    store.verify(following.stage, digests=True)


def test_what_filled_the_disk_goes_even_if_nothing_can_be_written(store, monkeypatch):
    """A lease that can't be given back for want of room holds no bytes; the next attempt frees an earlier one's before it writes."""
    lease = store.acquire("x", owner())
    (lease.out / "large").write_bytes(b"0" * 1000)
    partial = lease.work / ".step-00000001.partial"
    partial.mkdir()
    order = []

    def full(path, value):
        order.append(sorted(p.name for p in (store.root / ".tmp").iterdir()))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        lease.release()
    assert not lease.out.exists() and not partial.exists()
    lease.out.mkdir()
    order.clear()
    with pytest.raises(OSError, match="No space"):
        store.acquire("x", owner())
    assert order == [[]], "nothing of it is left when the new lease is written"


def test_discarding_leaves_the_lease_of_one_who_makes_it_again_alone(store, clock):
    store.acquire("x", owner()).commit({}, 1.0)
    (store.path("x") / "DONE.json").unlink()
    clock.now += 100
    again = store.acquire("x", owner(run="other"))
    store.discard("x")
    again.guard()
    assert store._read_lease("x")["expires"] > store.clock()
