"""Promises of the mapping from manifests to processes: what a container sees locally is what its manifest describes."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import UserError
from jobs.tools import local, pods

OVERLAY = pods.CHECKOUT / "overlays" / "kind"


def job(**container: Any) -> dict[str, Any]:
    """A Job manifest with one container, as kustomize renders it."""
    return {"kind": "Job", "metadata": {"name": "some-job-47ht86d9bm"}, "spec": {
        "backoffLimit": 2,
        "podFailurePolicy": {"rules": [
            {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}},
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]},
        "template": {"spec": {
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data-pvc"}},
                        {"name": "settings", "configMap": {"name": "settings"}}, {"name": "tmp", "emptyDir": {}}],
            "containers": [{"name": "main", "command": ["python", "-m", "jobs"]} | container]}}}}


SETTINGS = {"kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"a.yaml": "one", "b.yaml": "two"}}
MOUNTS = [{"name": "data", "mountPath": "/volumes/data"}, {"name": "settings", "mountPath": "/etc/settings"},
          {"name": "tmp", "mountPath": "/tmp"}]


def only(manifests: list[dict[str, Any]], state: Path, offset: int = 0) -> pods.Container:
    (pod,) = pods.pods(manifests, state, offset)
    return pod.containers[0]


def test_paths_at_below_and_above_a_mount_move_and_others_stay(tmp_path: Path) -> None:
    container = only([SETTINGS, job(volumeMounts=MOUNTS, args=[
        "--volumes=/volumes", "/volumes/data/x", "/volumes/dataset", "/etc", "/etc/passwd", "/", "/tmp/cache",
        "relative/path", "--flag", "text with /volumes inside"])], tmp_path)
    root = tmp_path / "pods" / "some-job-47ht86d9bm"
    assert container.argv == [
        sys.executable, "-m", "jobs", f"--volumes={root}/volumes", f"{root}/volumes/data/x", "/volumes/dataset",
        f"{root}/etc", "/etc/passwd", "/", f"{root}/tmp/cache", "relative/path", "--flag", "text with /volumes inside"]


def test_mounts_hold_the_claims_folder_and_the_config_maps_files(tmp_path: Path) -> None:
    only([SETTINGS, job(volumeMounts=MOUNTS)], tmp_path)
    root = tmp_path / "pods" / "some-job-47ht86d9bm"
    (root / "volumes" / "data" / "kept").write_text("x")
    assert (tmp_path / "volumes" / "data-pvc" / "kept").read_text() == "x"
    assert (root / "etc" / "settings" / "a.yaml").read_text() == "one"


def mounting(**volume: Any) -> dict[str, Any]:
    manifest = job(volumeMounts=[{"name": "mounted", "mountPath": "/mounted"}])
    manifest["spec"]["template"]["spec"]["volumes"] = [{"name": "mounted", **volume}]
    return manifest


def files(state: Path) -> dict[str, bytes]:
    """The files at the mount of `mounting()`."""
    return {p.name: p.read_bytes() for p in (state / "pods" / "some-job-47ht86d9bm" / "mounted").iterdir()
            if p.is_file()}


def test_a_config_map_has_its_binary_files_and_a_volume_the_items_that_it_names(tmp_path: Path) -> None:
    binary = {**SETTINGS, "binaryData": {"c.parquet": "/wA="}}
    only([binary, mounting(configMap={"name": "settings"})], tmp_path)
    assert files(tmp_path) == {"a.yaml": b"one", "b.yaml": b"two", "c.parquet": b"\xff\x00"}
    items = [{"key": "b.yaml", "path": "renamed.yaml"}]
    only([binary, mounting(configMap={"name": "settings", "items": items})], tmp_path)
    assert files(tmp_path) == {"renamed.yaml": b"two"}
    pods.write_config_map(tmp_path / "configmaps" / "settings", {"b.yaml": "three"})
    assert files(tmp_path) == {"renamed.yaml": b"three"}, "a change is followed here too"
    for wrong, message in (({"key": "d.yaml", "path": "d"}, "names the key d.yaml, which settings does not have"),
                           ({"key": "a.yaml", "path": "../a"}, r"the path \.\./a of `items` is not below the volume"),
                           ({"key": "a.yaml", "path": "/etc/a"}, "the path /etc/a of `items`")):
        with pytest.raises(UserError, match=f"^some-job: .*{message}"):
            only([binary, mounting(configMap={"name": "settings", "items": [wrong]})], tmp_path)


def test_a_mounted_secret_is_a_folder_of_the_state_and_may_be_missing_if_it_is_optional(tmp_path: Path) -> None:
    only([mounting(secret={"secretName": "keys", "optional": True})], tmp_path)
    assert files(tmp_path) == {}
    (tmp_path / "secrets" / "keys" / "team-a").write_text("key")
    only([mounting(secret={"secretName": "keys"})], tmp_path)
    assert files(tmp_path) == {"team-a": b"key"}
    with pytest.raises(UserError, match="the Secret others. .*write each of its keys to a file in .*/secrets/others"):
        only([mounting(secret={"secretName": "others"})], tmp_path)


def test_a_pod_knows_its_adapter_and_the_jobs_of_two_job_sets_have_names_of_their_own(tmp_path: Path) -> None:
    def job_set(adapter: str) -> dict[str, Any]:
        jobs = []
        for stage in ("model-training", "model-evaluation"):
            spec = job()["spec"]
            spec["template"]["metadata"] = {"labels": {"app.kubernetes.io/name": stage, pods.ADAPTER_LABEL: adapter}}
            jobs.append({"name": stage.removeprefix("model-"), "template": {"spec": spec}})
        return {"kind": "JobSet", "metadata": {"name": f"ft-{adapter}-47ht86d9bm"}, "spec": {"replicatedJobs": jobs}}

    found = pods.pods([SETTINGS, job(), job_set("a"), job_set("b")], tmp_path)
    assert {pod.title: pod.adapter for pod in found} == {
        "some-job": None, "model-training-a": "a", "model-evaluation-a": "a", "model-training-b": "b",
        "model-evaluation-b": "b"}


def test_the_overlays_jobs_mount_the_environment_and_the_file_of_their_own_adapter(tmp_path: Path) -> None:
    mapped = pods.pods(pods.render(OVERLAY), tmp_path)
    adapters = sorted(p.name for p in (OVERLAY / "adapters").iterdir())
    assert len(adapters) == 2
    assert sorted(pod.title for pod in mapped if pod.adapter) == sorted(
        f"{stage}-{name}" for name in adapters
        for stage in ("dataset-relocation", "dataset-encoding", "model-training", "model-evaluation"))
    for pod in mapped:
        if pod.kind == "Job":
            (container,) = pod.containers
            environment = Path(container.env["ENVIRONMENT_FILE"]).read_bytes()
            assert environment == (OVERLAY / "environment.yaml").read_bytes()
            if pod.adapter:
                own = OVERLAY / "adapters" / pod.adapter / "pipeline.yaml"
                assert Path(container.env["PIPELINE"]).read_bytes() == own.read_bytes()


def test_a_variable_without_a_value_is_empty(tmp_path: Path) -> None:
    assert only([job(env=[{"name": "EMPTY"}])], tmp_path).env["EMPTY"] == ""


def test_a_claim_keeps_its_files_from_run_to_run_and_a_pods_scratch_does_not(tmp_path: Path) -> None:
    manifests = [SETTINGS, job(volumeMounts=MOUNTS)]
    only(manifests, tmp_path)
    root = tmp_path / "pods" / "some-job-47ht86d9bm"
    (root / "volumes" / "data" / "kept").write_text("x")
    (root / "tmp" / "scratch").write_text("x")
    only(manifests, tmp_path)
    assert (root / "volumes" / "data" / "kept").exists()
    assert not (root / "tmp" / "scratch").exists()


def test_a_changed_config_map_switches_all_files_at_once_like_the_kubelet(tmp_path: Path) -> None:
    folder = tmp_path / "settings"
    pods.write_config_map(folder, {"a": "1", "b": "1"})
    first = (folder / "..data").resolve()
    pods.write_config_map(folder, {"a": "2", "c": "2"})
    assert (folder / "..data").resolve() != first
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith("..")) == ["a", "c"]
    assert ((folder / "a").read_text(), (folder / "c").read_text()) == ("2", "2")
    assert not first.exists()


def test_servers_bind_to_this_machine_only_and_ports_shift_together(tmp_path: Path) -> None:
    container = only([job(
        ports=[{"name": "http", "containerPort": 8000}], args=["--host=0.0.0.0", "--port=8000", "--size=80000"],
        env=[{"name": "PORT", "value": "8000"}], readinessProbe={"httpGet": {"path": "/health", "port": "http"}},
    )], tmp_path, offset=7)
    assert container.argv[3:] == ["--host=127.0.0.1", "--port=8007", "--size=80000"]
    assert container.env["PORT"] == "8007"
    assert container.ready_url == "http://127.0.0.1:8007/health"


def test_a_container_does_not_see_the_users_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "private")
    container = only([job(env=[{"name": "A", "value": "1"}])], tmp_path)
    assert container.env["A"] == "1"
    assert not {"AWS_SECRET_ACCESS_KEY", "HOME"} & container.env.keys()


def test_a_secret_is_the_variable_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = {"name": "s", "key": "k", "optional": True}
    manifest = job(env=[{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}}])
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert "HF_TOKEN" not in only([manifest], tmp_path).env
    monkeypatch.setenv("HF_TOKEN", "token")
    assert only([manifest], tmp_path).env["HF_TOKEN"] == "token"
    monkeypatch.delenv("HF_TOKEN")
    reference["optional"] = False
    with pytest.raises(UserError, match="needs the Secret s: set HF_TOKEN"):
        only([manifest], tmp_path)


def test_retries_follow_the_manifest(tmp_path: Path) -> None:
    (pod,) = pods.pods([job()], tmp_path)
    assert (pod.backoff_limit, pod.fatal_exit_codes, pod.title) == (2, frozenset({2}), "some-job")


# Runs in place of a container's program: its environment, its arguments, and every file at its mounts.
PROBE = """
import json, os, sys
from pathlib import Path
mounts = json.loads(sys.argv[1])
files = {m: {p.name: p.read_text() for p in Path(m).iterdir() if p.is_file()} for m in mounts}
print(json.dumps({"env": dict(os.environ), "argv": sys.argv[2:], "files": files}))
"""


def test_the_processes_of_the_overlay_see_what_the_manifest_of_their_container_describes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every container of overlays/kind, started by the local runner: all of the manifest is there, and nothing more."""
    secrets = {"HF_TOKEN": "the token", "VLLM_API_KEY": "the key"}
    for name, value in secrets.items() | {("AWS_SECRET_ACCESS_KEY", "private")}:
        monkeypatch.setenv(name, value)
    manifests = pods.render(OVERLAY)
    config = {m["metadata"]["name"]: m["data"] for m in manifests if m["kind"] == "ConfigMap"}
    for claim in (m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"):
        (tmp_path / "volumes" / claim).mkdir(parents=True)
        (tmp_path / "volumes" / claim / "claim").write_text(claim)
    workloads = {m["metadata"]["name"]: m["spec"]["template"]["spec"] for m in manifests
                 if m["kind"] in ("Job", "Deployment")}
    offset = 1000
    mapped = pods.pods(manifests, tmp_path, offset)
    assert {pod.name for pod in mapped} == workloads.keys()
    seen = asyncio.run(run_once([probing(pod, workloads[pod.name], tmp_path) for pod in mapped], tmp_path))

    for pod in mapped:
        root, spec = f"{tmp_path}/pods/{pod.name}", workloads[pod.name]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        described = [*spec.get("initContainers", []), *spec["containers"]]
        for container, sight in zip(described, seen[pod.name], strict=True):
            where = f"{pod.title}/{container['name']}"
            ports = {str(port["containerPort"]) for port in container.get("ports", [])}
            here = functools.partial(as_here, root=root, ports=ports, offset=offset)

            arguments = [*container["command"][1:], *container.get("args", [])]
            assert sight["argv"] == [here(argument) for argument in arguments], where

            stated = {e["name"]: here(e["value"]) if "value" in e else secrets[e["name"]] for e in container["env"]}
            assert {name: sight["env"].get(name) for name in stated} == stated, where
            # Python itself sets LC_CTYPE where there is no locale.
            assert sight["env"].keys() - stated.keys() <= {*pods.INHERITED, "PYTHONPATH", "LC_CTYPE"}, where

            for mount in container["volumeMounts"]:
                volume = volumes[mount["name"]]
                if "configMap" in volume:
                    files = config[volume["configMap"]["name"]]
                elif "persistentVolumeClaim" in volume:
                    files = {"claim": volume["persistentVolumeClaim"]["claimName"]}
                else:
                    files = {}  # scratch, new for each run
                assert sight["files"][root + mount["mountPath"]] == files, f"{where}: {mount['mountPath']}"


def as_here(text: str, root: str, ports: set[str], offset: int) -> str:
    """A value or argument of the manifest as it must be on this machine; every path in the overlay is on a mount."""
    option, equals, value = text.rpartition("=") if text.startswith("--") else ("", "", text)
    value = f"{root}{value}" if value.startswith("/") else value.replace("0.0.0.0", "127.0.0.1")
    return option + equals + (str(int(value) + offset) if value in ports else value)


def probing(pod: pods.Pod, spec: dict[str, Any], state: Path) -> pods.Pod:
    """The pod with PROBE in place of its programs."""
    def probed(containers: list[pods.Container], manifests: list[dict[str, Any]]) -> list[pods.Container]:
        mounts = [[f"{state}/pods/{pod.name}{m['mountPath']}" for m in c["volumeMounts"]] for c in manifests]
        return [replace(container, argv=[container.argv[0], "-c", PROBE, json.dumps(places), *container.argv[1:]])
                for container, places in zip(containers, mounts, strict=True)]

    return replace(pod, init_containers=probed(pod.init_containers, spec.get("initContainers", [])),
                   containers=probed(pod.containers, spec["containers"]))


async def run_once(mapped: list[pods.Pod], state: Path) -> dict[str, list[dict[str, Any]]]:
    """Run every pod as `jobs local` does. Returns what its containers printed, init containers first."""
    runner = local.Runner(mapped, state, verbose=False)
    codes = await asyncio.gather(*(runner._run_containers(pod) for pod in mapped))
    logs = {pod.name: runner.log_file(pod).read_text() for pod in mapped}
    assert set(codes) == {0}, logs
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in logs.items()}


def test_without_kubectl_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="kubectl is not installed.*1.32"):
        pods.render(OVERLAY)


@pytest.mark.parametrize(("stderr", "error"), [
    ("", "no error message"),
    ("Warning: old\nerror: no such file\n", "no such file"),
    ("E1123 trying\nUnable to connect to the server: timeout\n", "Unable to connect to the server: timeout"),
    ("Warning: x\nError from server (A): a\nError from server (B): b\n",
     "Error from server (A): a Error from server (B): b"),
    ('# Warning: old\nE1125 20:45:12.5 1 run.go:72] "command failed" err="unknown field \\"bogus\\""\n',
     'unknown field "bogus"'),
    ('E1125 20:45:12.5 1 run.go:72] "command failed" err=<\n\tno file:\n\t`a.yaml`\n >\n', "no file: `a.yaml`"),
    ('E1125 22:10:17.3 21737 run.go:72] "command failed" err=<\n\ttrouble with `\n\tpath: a.yaml\n\t`: not found\n >\n',
     "trouble with ` path: a.yaml `: not found"),
])
def test_of_what_kubectl_writes_the_error_is_shown_on_one_line(stderr: str, error: str) -> None:
    assert pods.error_in(stderr) == error


@pytest.mark.timeout(30)
def test_a_fifo_among_an_overlays_files_is_named_and_not_waited_for(tmp_path: Path) -> None:
    """kubectl would wait for a writer for ever."""
    (tmp_path / "kustomization.yaml").write_text("configMapGenerator: [{name: x, files: [adapter/data.jsonl]}]\n")
    (tmp_path / "adapter").mkdir()
    os.mkfifo(tmp_path / "adapter" / "data.jsonl")
    with pytest.raises(UserError, match=r"/adapter/data\.jsonl: is a FIFO, not a plain file"):
        pods.render(tmp_path)


def test_an_overlay_that_does_not_render_shows_kustomizes_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no kustomization\.yaml"):
        pods.render(tmp_path)
    shutil.copytree(OVERLAY, tmp_path / "copy")
    with pytest.raises(UserError, match="does not render"):
        pods.render(tmp_path / "copy")
