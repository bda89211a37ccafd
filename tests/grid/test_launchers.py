"""Launcher files against the profile: the shipped ones fit it, and each way of not fitting is told with its line and its way out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from datasets_ray.errors import UserError, UserErrors
from grid import check, launchers, probe
from grid.load import load
from tests.grid.studies import changed

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "experiments" / "full_ablation.yaml"
CLUSTERS = ROOT / "experiments" / "clusters"
FILES = ("rayjob.yaml", "ray-cluster.yaml", "slurm.sh")


@pytest.fixture(scope="module")
def loaded():
    return load(STUDY, "cluster")


def written(name: str, directory: Path, *changes: tuple[str, str]) -> Path:
    """A shipped launcher with its blanks filled and some texts replaced."""
    text = (CLUSTERS / name).read_text().replace("REPLACE-ME", "mine")
    for old, new in changes:
        text = changed(text, old, new)
    (directory / name).write_text(text)
    return directory / name


def mistakes(path: Path, loaded) -> list[UserError]:
    with pytest.raises(UserErrors) as caught:
        launchers.check(path, loaded)
    return caught.value.errors


@pytest.mark.parametrize("name", FILES)
def test_shipped_launchers_fit_the_cluster_profile_and_say_what_is_left_to_fill(name, tmp_path, loaded):
    said = launchers.check(written(name, tmp_path), loaded)
    assert "16 GPUs" in said and ("runs the study" in said) == (name != "ray-cluster.yaml")
    blanks = sum("REPLACE-ME" in line for line in (CLUSTERS / name).read_text().splitlines())
    if not blanks:
        assert "16 GPUs" in launchers.check(CLUSTERS / name, loaded)
        return
    told = mistakes(CLUSTERS / name, loaded)
    assert len(told) == blanks
    for error in told:
        file, _, line = error.where.rpartition(":")
        assert "REPLACE-ME" in Path(file).read_text().splitlines()[int(line) - 1] and "put your own" in error.hint


RAYJOB = {
    "GPUs": (("replicas: 4\n        minReplicas", "replicas: 3\n        minReplicas"), "12 GPUs, the profile needs 16", "multiple of it"),
    "CPUs": (('limits: {cpu: "32"', 'limits: {cpu: "4"'), "4 CPUs on a node of group gpu, 5 are needed", "give the node 5"),
    "storage": (
        ("mountPath: /shared/finegrid}", "mountPath: /elsewhere}"),
        "store /shared/finegrid/store is not shared by the head",
        "mount",
    ),
    "token": (("    authOptions: {mode: token}", "    enableInTreeAutoscaling: false"), "Ray asks nobody for a token", "authOptions"),
    "secret": (
        ('value: "1"}', 'value: "1"}\n                - {name: HF_TOKEN, value: abc}'),
        "a secret stands in the file: HF_TOKEN",
        "secretKeyRef",
    ),
    "known secret": (
        ("            - name: ray-head", "            - name: ray-head # hf_" + "a" * 30),
        "a secret stands in the file",
        "keep it in a secret",
    ),
    "study": (
        ("experiments/full_ablation.yaml --profile cluster --out", "experiments/photos.yaml --profile cluster --out"),
        "it runs experiments/photos.yaml",
        "full_ablation.yaml",
    ),
    "profile": (
        ("full_ablation.yaml --profile cluster --out", "full_ablation.yaml --profile gpu --out"),
        "it runs at profile gpu",
        "--profile cluster",
    ),
    "no profile": (
        ("full_ablation.yaml --profile cluster --out", "full_ablation.yaml --out"),
        "it runs at profile tiny",
        "--profile cluster",
    ),
    "no out": ((" --out /shared/finegrid/runs/full_ablation", ""), "no --out", "--out DIR"),
    "local out": (("--out /shared/finegrid/runs/full_ablation", "--out /tmp/run"), "--out /tmp/run is not shared by the head", "mount"),
    "no store": (("FINEGRID_STORE", "OTHER"), "no store", "FINEGRID_STORE=DIR"),
    "submitter": (
        ("submitterConfig: {backoffLimit: 0}", "submitterConfig: {backoffLimit: 2}"),
        "the submitter is tried again",
        "backoffLimit: 0",
    ),
    "shutdown": (
        ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false"),
        "the cluster stays",
        "shutdownAfterJobFinishes: true",
    ),
    "quotes": (("python -m grid.run", 'python -m "grid.run'), "entrypoint can't be read", "quote it"),
    "no study": (("python -m grid.run", "python -m grid.plan"), "no grid.run in the command", "python -m grid.run"),
}


@pytest.mark.parametrize("name", RAYJOB)
def test_a_rayjob_that_does_not_fit_is_told_where_and_what_to_write(name, tmp_path, loaded):
    change, what, way_out = RAYJOB[name]
    path = written("rayjob.yaml", tmp_path, change)
    told = mistakes(path, loaded)
    found = [error for error in told if what in error.what]
    assert found and way_out in found[0].hint, [error.render() for error in told]
    assert found[0].where.startswith(str(path))


def test_all_mistakes_of_a_file_come_at_once(tmp_path, loaded):
    path = written("rayjob.yaml", tmp_path, RAYJOB["GPUs"][0], RAYJOB["token"][0], RAYJOB["submitter"][0], RAYJOB["study"][0])
    assert len(mistakes(path, loaded)) == 4


def test_pods_on_different_claims_do_not_share(tmp_path, loaded):
    other = (
        "            volumes: *volumes",
        "            volumes: [{name: shared, persistentVolumeClaim: {claimName: another}}, {name: memory, emptyDir: {}}]",
    )
    told = [error.what for error in mistakes(written("rayjob.yaml", tmp_path, other), loaded)]
    assert told == [f"{what} is not the same storage on all nodes" for what in (
        "store /shared/finegrid/store", "data_root /shared/finegrid/data", "--out /shared/finegrid/runs/full_ablation")]  # fmt: skip


def test_a_token_from_a_secret_on_every_pod_is_as_good_as_kuberays_own(tmp_path, loaded):
    token = "\n".join([
        "                - {name: RAY_AUTH_MODE, value: token}",
        "                - {name: RAY_AUTH_TOKEN, valueFrom: {secretKeyRef: {name: ours, key: auth_token}}}",
    ])  # fmt: skip
    given = ('                - {name: HF_HUB_OFFLINE, value: "1"}', f'                - {{name: HF_HUB_OFFLINE, value: "1"}}\n{token}')
    assert "16 GPUs" in launchers.check(written("rayjob.yaml", tmp_path, RAYJOB["token"][0], given), loaded)


def test_the_profiles_own_places_are_the_launchers(tmp_path):
    own = load(STUDY, "cluster", ["store=/shared/finegrid/store", "data_root=/shared/other/data"])
    told = mistakes(written("rayjob.yaml", tmp_path), own)
    assert [error.what for error in told] == ["data_root is /shared/finegrid/data here and /shared/other/data in the profile"]
    two = load(STUDY, "cluster", ["resources.lanes=2"])
    assert [error.what for error in mistakes(written("rayjob.yaml", tmp_path), two)] == ["16 GPUs, the profile needs 32"]


def test_a_profile_for_cores_has_no_use_for_gpus(tmp_path):
    told = mistakes(written("rayjob.yaml", tmp_path), load(STUDY, "tiny"))
    assert {"16 GPUs and none is used", "it runs at profile cluster"} == {error.what for error in told}


CLUSTER = {
    "nodes": (("mine-2, mine-3]", "mine-2]"), "12 GPUs, the profile needs 16"),
    "token": (('  "~/.ray/auth_token": "~/.ray/auth_token"', '  "~/a": "~/a"'), "Ray asks nobody for a token"),
    "open dashboard": (("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"), "the dashboard listens to everyone"),
    "untested folder": (("  - test -w /shared/finegrid\n", ""), "store /shared/finegrid/store is not shared by the head"),
    "cloud": (("  type: local", "  type: aws"), "provider 'aws'"),
    "no start": (
        ("    ray start --address=$RAY_HEAD_IP:6379", "    ray status --address=$RAY_HEAD_IP:6379"),
        "worker_start_ray_commands: no `ray start`",
    ),
    "token in it": (
        ("RAY_JOB_STOP_WAIT_TIME_S=600;", "RAY_JOB_STOP_WAIT_TIME_S=600 RAY_AUTH_TOKEN=abcdef;"),
        "a secret stands in the file: RAY_AUTH_TOKEN",
    ),
}


@pytest.mark.parametrize("name", CLUSTER)
def test_a_cluster_of_ray_up_that_does_not_fit_is_told(name, tmp_path, loaded):
    change, what = CLUSTER[name]
    told = mistakes(written("ray-cluster.yaml", tmp_path, change), loaded)
    assert any(what in error.what and error.hint for error in told), [error.render() for error in told]


SLURM = {
    "GPUs": (("--gpus-per-node=4", "--gpus-per-node=2"), "8 GPUs, the profile needs 16"),
    "counted": (("--num-gpus=4", "--num-gpus=8"), "Ray counts 8 GPUs a node, Slurm gives 4"),
    "nodes": (('--min-nodes "$SLURM_JOB_NUM_NODES"', "--min-nodes 2"), "--min-nodes is 2"),
    "token": (("export RAY_AUTH_MODE=token ", "export "), "Ray asks nobody for a token"),
    "folder": (('test -w "$SHARED"', "true"), "store /shared/finegrid/store is not shared by the nodes"),
    "address": (('env RAY_ADDRESS="$ADDRESS" ', ""), "no RAY_ADDRESS"),
    "separator": (("--num-gpus=4 -- \\", "--num-gpus=4 \\"), "no `--` before the study's command"),
    "head": (("--num-gpus=4 -- \\", "--num-gpus=4 --head -- \\"), "--head for symmetric-run"),
    "tasks": (('srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \\', "srun --ntasks-per-node=4 \\"), "not one task a node"),
    "profile": (("--profile cluster --out", "--profile tiny --out"), "it runs at profile tiny"),
    "no ray": (("  ray symmetric-run --address", "  ray start --address"), "no `ray symmetric-run`"),
    "out": (("OUT=$SHARED/runs/full_ablation", "OUT=/tmp/run"), "--out /tmp/run is not shared by the nodes"),
}


@pytest.mark.parametrize("name", SLURM)
def test_a_slurm_script_that_does_not_fit_is_told(name, tmp_path, loaded):
    change, what = SLURM[name]
    told = mistakes(written("slurm.sh", tmp_path, change), loaded)
    assert any(what in error.what and error.hint for error in told), [error.render() for error in told]


def test_a_file_that_starts_nothing_is_no_launcher(tmp_path, loaded):
    (tmp_path / "pod.yaml").write_text("kind: Pod\n---\nkind: Service\n")
    for path, what in ((tmp_path / "pod.yaml", "is no launcher"), (tmp_path / "none.yaml", "no file")):
        with pytest.raises(UserError) as caught:
            launchers.check(path, loaded)
        assert what in caught.value.what and caught.value.hint


def test_a_manifest_beside_others_keeps_its_lines(tmp_path, loaded):
    path = written("rayjob.yaml", tmp_path, RAYJOB["shutdown"][0])
    path.write_text("kind: Namespace\nmetadata: {name: mine}\n---\n" + path.read_text())
    (error,) = mistakes(path, loaded)
    number = next(i for i, line in enumerate(path.read_text().splitlines(), 1) if line.startswith("spec:"))
    assert error.where == f"{path}:{number}"


def test_the_shell_script_is_one_and_the_cluster_is_what_ray_expects():
    subprocess.run(["bash", "-n", str(CLUSTERS / "slurm.sh")], check=True)
    jsonschema = pytest.importorskip("jsonschema")
    import json
    from importlib.util import find_spec

    ray = find_spec("ray")
    assert ray is not None and ray.origin is not None
    schema = json.loads((Path(ray.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((CLUSTERS / "ray-cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "head_start_commands": []}, schema)
    manifest = yaml.safe_load((CLUSTERS / "rayjob.yaml").read_text())
    version = manifest["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"ray[default,train,tune,data]>={version.rpartition('.')[0]}" in (ROOT / "pyproject.toml").read_text()


def test_pods_keep_pixels_on_a_volume_of_the_nodes_own_that_is_large_enough(loaded):
    """Not in the container's layers, and never on the shared claim."""
    cluster = yaml.safe_load((CLUSTERS / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    resources = loaded.profile.resources
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (place,) = [entry["value"] for entry in container["env"] if entry["name"] == "FINEGRID_PIXELS"]
        (mount,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == place]
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount]
        limit = volume["emptyDir"]["sizeLimit"]
        assert limit.endswith("Gi") and int(limit[:-2]) * 1024 > resources.pixels_mb + resources.features_mb
        assert "medium" not in volume["emptyDir"], "memory is dear"


def test_check_holds_a_launcher_against_the_profile_as_a_step_of_its_own(tmp_path, capsys, monkeypatch):
    def ask(task, request, timeout):
        facts = {"cpus": 2, "gpus": 0, "memory_gib": 16.0, "versions": {"ray": "x"}} if task == "machine" else {}
        return {"facts": facts, "failures": []}

    monkeypatch.setattr(probe, "ask", ask)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = [str(STUDY), "--profile", "cluster", "--out", str(tmp_path), "--launcher"]
    check.main([*words, str(written("rayjob.yaml", tmp_path))])
    said = capsys.readouterr().out
    assert "[8/8] launcher" in said and "ok (RayJob: 5 nodes, 16 GPUs, runs the study)" in said
    assert "the launcher's nodes compute" in said and "a lane needs" not in said
    assert check.main([*words, str(CLUSTERS / "rayjob.yaml")]) == 1
    assert "put your own in place of REPLACE-ME" in capsys.readouterr().out
