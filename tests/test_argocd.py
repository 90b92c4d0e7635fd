"""Promises of argocd/: a fork edits one file, a push is a deployment, and Argo CD can do nothing beyond its task."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.core import artifacts
from jobs.tools import argocd
from tests.manifests import (
    CHECKOUT,
    Manifest,
    adapters,
    add_adapter,
    by_name,
    containers,
    copy,
    of_kind,
    pod_templates,
    render,
    restricted_violations,
)
from tests.renderings import NAMES, rendered
from tests.validation import problems

ARGOCD = CHECKOUT / "argocd"
OVERLAYS = [name for name in NAMES if name.startswith("overlays/")]  # and with all of their optional components
CLUSTER_SCOPED = {"Namespace"}
# What the controllers make of the kinds in git: listed so that Argo CD shows it, and nobody gains anything by it.
SHOWN = {("", "Pod"), ("apps", "ReplicaSet")}


@pytest.fixture
def both() -> list[Manifest]:
    """argocd/ with the second environment switched on, as a person would, by removing the comment signs."""
    return rendered("argocd with options")


def settings() -> dict[str, str]:
    values: dict[str, str] = next(yaml.safe_load_all((ARGOCD / "settings.yaml").read_text()))["data"]
    return values


def project(found: list[Manifest]) -> Manifest:
    (only,) = of_kind(found, "AppProject")
    return only


def application_set(found: list[Manifest]) -> Manifest:
    (only,) = of_kind(found, "ApplicationSet")
    return only


def elements(found: list[Manifest]) -> list[dict[str, str]]:
    """The environments in the ApplicationSet's list."""
    (generator,) = application_set(found)["spec"]["generators"]
    listed: list[dict[str, str]] = generator["list"]["elements"]
    return listed


def filled_in(template: Any, element: dict[str, str]) -> Any:
    """What Argo CD makes of a template for an element; like `missingkey=error`, a missing key is an error."""
    if isinstance(template, dict):
        return {key: filled_in(value, element) for key, value in template.items()}
    if isinstance(template, list):
        return [filled_in(value, element) for value in template]
    if isinstance(template, str):
        return re.sub(r"{{ \.(\w+) }}", lambda found: element[found[1]], template)
    return template


def applications(found: list[Manifest]) -> dict[str, Manifest]:
    """All Applications: the one in git, and those that Argo CD makes of the list."""
    template = application_set(found)["spec"]["template"]
    made = [{"apiVersion": "argoproj.io/v1alpha1", "kind": "Application", **filled_in(template, element)}
            for element in elements(found)]
    return {a["metadata"]["name"]: a for a in [*of_kind(found, "Application"), *made]}


# --- settings -----------------------------------------------------------------------------------------------------


def test_only_the_project_and_applications_reach_the_cluster() -> None:
    """And all of them in Argo CD's namespace. The settings are read, not applied."""
    found = rendered("argocd")
    assert sorted((m["kind"], m["metadata"]["namespace"]) for m in found) == [
        ("AppProject", "argocd"), ("Application", "argocd"), ("ApplicationSet", "argocd")]


def test_one_environment_is_a_plain_application_and_nothing_else() -> None:
    assert elements(rendered("argocd")) == []
    assert applications(rendered("argocd")).keys() == {"lora-gitops"}


# Three environments, one of them in another cluster.
MANY = [{"name": "gpu", "path": "overlays/gpu", "namespace": "lora-gitops-gpu",
         "cluster": "https://kubernetes.default.svc"},
        {"name": "berlin", "path": "overlays/berlin", "namespace": "berlin", "cluster": "https://berlin.example.com:6443"}]
NEW = {"repoURL": "https://git.example.org/mine.git", "revision": "release", "overlay": "overlays/mine",
       "namespace": "mine"}


@pytest.fixture
def many(tmp_path: Path) -> list[Manifest]:
    """argocd/ of a fork with three environments, for which settings.yaml is edited and nothing else."""
    folder = Path(shutil.copytree(ARGOCD, tmp_path / "argocd"))
    documents = {d["kind"]: d for d in yaml.safe_load_all((folder / "settings.yaml").read_text())}
    documents["ConfigMap"]["data"] = NEW
    documents["ApplicationSet"]["spec"]["generators"][0]["list"]["elements"] = MANY
    spec = documents["AppProject"]["spec"]
    spec["destinations"] += [{"server": e["cluster"], "namespace": e["namespace"]} for e in MANY]
    spec["clusterResourceWhitelist"] += [{"group": "", "kind": "Namespace", "name": e["namespace"]} for e in MANY]
    (folder / "settings.yaml").write_text(yaml.safe_dump_all(documents.values()))
    return render(folder)


def test_a_fork_edits_one_file(many: list[Manifest]) -> None:
    """Nothing of the old values is left anywhere, and each environment has an Application, valid as one in git."""
    assert [problem for document in many for problem in problems(document)] == []
    found = applications(many)
    assert found.keys() == {"lora-gitops", "lora-gitops-gpu", "lora-gitops-berlin"}
    wanted = [{"name": "", "path": NEW["overlay"], "namespace": NEW["namespace"],
               "cluster": "https://kubernetes.default.svc"}, *MANY]
    for environment in wanted:
        application = found["-".join(filter(None, ("lora-gitops", environment["name"])))]
        assert problems(application) == []
        assert application["spec"]["source"] == {"repoURL": NEW["repoURL"], "targetRevision": NEW["revision"],
                                                 "path": environment["path"]}
        assert application["spec"]["destination"] == {"server": environment["cluster"],
                                                      "namespace": environment["namespace"]}
    spec = project(many)["spec"]
    assert spec["sourceRepos"] == [NEW["repoURL"]]
    text = yaml.safe_dump_all(many)
    assert settings()["repoURL"] not in text
    assert settings()["overlay"] not in text
    assert "namespace: lora-gitops\n" not in text


def test_make_kind_argocd_deploys_one_environment_of_a_fork_with_many(
        many: list[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(elements(many)) == 2
    monkeypatch.setattr(argocd, "CHECKOUT", tmp_path)  # where `many` has its argocd/
    settings = ("git://git-server/x.git", "main", "overlays/kind", "lora-gitops")
    found = render(argocd.with_settings(tmp_path / "copy", *settings))
    assert applications(found).keys() == {"lora-gitops"}
    spec = applications(found)["lora-gitops"]["spec"]
    assert (*spec["source"].values(), spec["destination"]["namespace"]) == (
        "overlays/kind", "git://git-server/x.git", "main", "lora-gitops")
    assert [d["namespace"] for d in project(found)["spec"]["destinations"]] == ["lora-gitops"]
    assert [k["name"] for k in project(found)["spec"]["clusterResourceWhitelist"]] == ["lora-gitops"]


def test_all_applications_have_everything_else_in_common(many: list[Manifest]) -> None:
    """What the sync does, and what happens when an Application is deleted."""
    first, *others = applications(many).values()
    assert len(others) == 2
    for other in others:
        for key in ("annotations", "finalizers", "labels"):
            assert other["metadata"][key] == first["metadata"][key], key
        for key in ("project", "syncPolicy"):
            assert other["spec"][key] == first["spec"][key], key
        assert other["spec"].keys() == first["spec"].keys()


@pytest.mark.parametrize("key", ["name", "path", "namespace", "cluster"])
def test_an_environment_without_a_key_is_an_error_and_not_one_somewhere_else(many: list[Manifest], key: str) -> None:
    spec = application_set(many)["spec"]
    assert (spec["goTemplate"], spec["goTemplateOptions"]) == (True, ["missingkey=error"])
    with pytest.raises(KeyError, match=key):
        filled_in(spec["template"], {k: v for k, v in MANY[0].items() if k != key})


def test_a_removed_environment_frees_its_gpus_and_keeps_its_volumes(many: list[Manifest]) -> None:
    """Its Application goes, as if it were deleted by hand. (That the volumes stay is tested below.)"""
    spec = application_set(many)["spec"]
    assert spec["syncPolicy"] == {"preserveResourcesOnDeletion": False}
    assert spec["template"]["metadata"]["finalizers"] == ["resources-finalizer.argocd.argoproj.io"]


def test_an_application_follows_an_overlay_into_its_namespace(both: list[Manifest]) -> None:
    assert applications(both).keys() == {"lora-gitops", "lora-gitops-gpu"}
    for application in applications(both).values():  # in a fork, this finds a path or a namespace that is wrong
        (namespace,) = of_kind(rendered(application["spec"]["source"]["path"]), "Namespace")
        assert application["spec"]["destination"] == {"server": "https://kubernetes.default.svc",
                                                      "namespace": namespace["metadata"]["name"]}


# --- what Argo CD may do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["argocd", "argocd with options"])
def test_the_project_allows_only_this_repository_and_the_places_of_its_applications(name: str) -> None:
    """In a fork, this finds lists in settings.yaml that do not agree."""
    found = rendered(name)
    spec = project(found)["spec"]
    assert spec["sourceRepos"] == [settings()["repoURL"]]
    places = [(a["spec"]["destination"]["server"], a["spec"]["destination"]["namespace"])
              for a in applications(found).values()]
    assert sorted((d["server"], d["namespace"]) for d in spec["destinations"]) == sorted(places)
    assert len(set(places)) == len(places)  # two Applications in one namespace would prune each other's objects
    assert {a["spec"]["project"] for a in applications(found).values()} == {project(found)["metadata"]["name"]}
    assert project(found)["metadata"]["finalizers"]  # it outlives its Applications
    names = [e["name"] for e in elements(found)]
    assert len(set(names)) == len(names)


def test_the_project_allows_exactly_the_kinds_that_are_rendered() -> None:
    """Those of every overlay with all its optional components, and no Secret."""
    kinds = {(m["apiVersion"].rpartition("/")[0], m["kind"]) for overlay in OVERLAYS for m in rendered(overlay)}
    assert {"JobSet", "ScaledObject", "PodMonitor", "Job"} <= {kind for _, kind in kinds}
    spec = project(rendered("argocd"))["spec"]
    allowed = [(k["group"], k["kind"]) for k in spec["namespaceResourceWhitelist"]]
    assert len(allowed) == len(set(allowed))
    assert set(allowed) == {k for k in kinds if k[1] not in CLUSTER_SCOPED} | SHOWN
    assert "Secret" not in {kind for _, kind in allowed}


@pytest.mark.parametrize("name", ["argocd", "argocd with options"])
def test_argo_cd_may_touch_no_namespace_but_its_own_environments(name: str) -> None:
    """By name: a push cannot relabel kube-system."""
    spec = project(rendered(name))["spec"]
    assert sorted((k["group"], k["kind"], k["name"]) for k in spec["clusterResourceWhitelist"]) == sorted(
        ("", "Namespace", d["namespace"]) for d in spec["destinations"])


def test_a_push_cannot_weaken_pod_security(both: list[Manifest]) -> None:
    """The API server refuses it, in exactly the namespaces that Argo CD may change by the settings, or by what they
    offer."""
    policy, binding = yaml.safe_load_all((ARGOCD / "pod-security.yaml").read_text())
    assert problems(policy) == problems(binding) == []
    (rule,) = policy["spec"]["matchConstraints"]["resourceRules"]
    assert set(rule["resourceNames"]) == {d["namespace"] for d in project(both)["spec"]["destinations"]}
    assert set(rule["operations"]) == {"CREATE", "UPDATE"}
    assert (binding["spec"]["policyName"], binding["spec"]["validationActions"]) == (
        policy["metadata"]["name"], ["Deny"])
    for overlay in OVERLAYS:  # what is in git passes
        (namespace,) = of_kind(rendered(overlay), "Namespace")
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert "ValidatingAdmissionPolicy" not in {m["kind"] for m in both}  # cluster-wide: the platform's to apply


# --- syncing ------------------------------------------------------------------------------------------------------


def test_a_push_is_deployed_pruned_healed_and_tried_until_it_works(both: list[Manifest]) -> None:
    for name, application in applications(both).items():
        policy = application["spec"]["syncPolicy"]
        assert policy["automated"] == {"prune": True, "selfHeal": True}, name
        assert policy["retry"]["limit"] == -1, name
        assert policy["retry"]["refresh"] is True, name  # or a broken commit is retried, and its repair waits for ever
        assert policy["retry"]["backoff"]["maxDuration"] == "3m", name
        assert "ServerSideApply=true" in policy["syncOptions"], name  # data above 256 KiB
        assert "PrunePropagationPolicy=background" in policy["syncOptions"], name
        assert "FailOnSharedResource=true" in policy["syncOptions"], name
        options = application["metadata"]["annotations"]["argocd.argoproj.io/compare-options"]
        assert "ServerSideDiff=true" in options, name
        # Jobs cannot be replaced, and a second way to make the namespace would be a phase of its own, before the sync.
        assert not [o for o in policy["syncOptions"] if o.startswith(("Replace", "Force", "CreateNamespace"))], name
        assert application["metadata"]["finalizers"] == ["resources-finalizer.argocd.argoproj.io"], name


def test_no_sync_waits_for_a_job() -> None:
    """Neither hooks nor waves: with either, the next push would wait until the training is done."""
    files = [f for folder in ("argocd", "base", "serving", "overlays") for f in (CHECKOUT / folder).rglob("*.yaml")]
    assert len(files) > 30
    for overlay in OVERLAYS:
        for manifest in rendered(overlay):
            annotations = manifest["metadata"].get("annotations", {}).keys()
            assert not {a for a in annotations if a.endswith(("/hook", "/sync-wave"))}, manifest["metadata"]["name"]
    for file in files:
        text = file.read_text()
        assert "argocd.argoproj.io/hook" not in text, file
        assert "argocd.argoproj.io/sync-wave" not in text, file


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_volumes_and_namespace_survive_the_application(overlay: str) -> None:
    """Their data costs hours to make; everything else comes back within minutes, and a GPU must not stay taken."""
    for manifest in rendered(overlay):
        options = manifest["metadata"].get("annotations", {}).get("argocd.argoproj.io/sync-options", "").split(",")
        keeps = {"Prune=false", "Delete=false"} <= set(options)
        assert keeps == (manifest["kind"] in ("PersistentVolumeClaim", "Namespace")), manifest["metadata"]["name"]


def test_the_health_of_a_job_set_is_a_patch_of_argo_cds_own_settings() -> None:
    """Not among what is applied: it would take the other settings of that ConfigMap away."""
    patch = yaml.safe_load((ARGOCD / "jobset-health.yaml").read_text())
    assert list(patch) == ["data"]
    assert list(patch["data"]) == ["resource.customizations.health.jobset.x-k8s.io_JobSet"]
    assert "ConfigMap" not in {m["kind"] for m in rendered("argocd")}


# --- docs/operations.md -------------------------------------------------------------------------------------------

OPERATIONS = (CHECKOUT / "docs" / "operations.md").read_text()


def block(pattern: str) -> str:
    """The one group that a pattern finds in docs/operations.md."""
    (found,) = re.findall(pattern, OPERATIONS, re.DOTALL)
    return str(found)


def test_the_documented_pod_for_the_volumes_is_admitted_and_finds_them_all() -> None:
    pod = yaml.safe_load(block(r"<<'EOF'\n(.*?)EOF"))
    assert restricted_violations(pod | {"metadata": {}}) == []
    claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["spec"]["volumes"]}
    rendered_claims = by_name(rendered("overlays/kind"), "PersistentVolumeClaim").keys()
    assert claims == rendered_claims
    (shell,) = pod["spec"]["containers"]
    assert {m["mountPath"] for m in shell["volumeMounts"]} == {
        f"/volumes/{claim.removesuffix('-pvc')}" for claim in rendered_claims}


def test_the_documented_verification_finds_every_artifact_and_every_change(tmp_path: Path) -> None:
    program = block(r"volumes -- python (-m jobs) verify\n").split()
    spec = artifacts.Spec("fine-tuned-model", "adapter", {"r": 8})

    def write(draft: Path) -> None:
        (draft / "weights").write_bytes(b"0" * 100)

    artifact = artifacts.publish(spec, tmp_path, write, keep=5)
    command = [sys.executable, *program, "--volumes", str(tmp_path), "verify"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{spec}: verified" in done.stderr
    (artifact.path / "weights").write_bytes(b"1" * 100)
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "weights was changed" in done.stderr


def test_the_documented_filter_leaves_namespace_and_volumes_only() -> None:
    program = block(r"\.venv/bin/python -c '(.*?)'")
    done = subprocess.run([sys.executable, "-c", program], input=yaml.safe_dump_all(rendered("overlays/kind")),
                          capture_output=True, text=True, check=True)
    kept = list(yaml.safe_load_all(done.stdout))
    assert {m["kind"] for m in kept} == {"Namespace", "PersistentVolumeClaim"}
    assert len(kept) == 1 + len(of_kind(rendered("overlays/kind"), "PersistentVolumeClaim"))


def with_entry(file: Path, key: str, entry: Any) -> None:
    """Add an entry to a list of a kustomization, before the others."""
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(values | {key: [entry, *values.get(key, [])]}))


@pytest.mark.parametrize("name", ["kind", "kind-smollm2", "gpu"])
def test_the_documented_mirror_is_known_to_relocation_alone_in_every_overlay(tmp_path: Path, name: str) -> None:
    text = (CHECKOUT / "docs" / "registries.md").read_text()
    files = dict(re.findall(r"```yaml\n# mirror/(\S+)\n(.*?)```", text, re.DOTALL))
    (generator,) = re.findall(r"```yaml\n(components:\n- mirror\n.*?)```", text, re.DOTALL)
    overlay = copy(tmp_path).parent / name
    (overlay / "ca.crt").write_text("certificates")
    (overlay / "mirror").mkdir()
    for file, content in files.items():
        (overlay / "mirror" / file).write_text(content)
    assert files.keys() == {"kustomization.yaml", "mirror.yaml"}
    for key, (entry,) in yaml.safe_load(generator).items():
        with_entry(overlay / "kustomization.yaml", key, entry)
    if name == "gpu":
        with_entry(overlay / "adapter" / "kustomization.yaml", "components", "../mirror")
    found = render(overlay)
    templates = pod_templates(found)
    roles = {title: t["metadata"]["labels"]["app.kubernetes.io/component"] for title, t in templates.items()}
    assert list(roles.values()).count("relocation") == 3 + len(adapters(overlay))
    for title, template in templates.items():
        container = containers(template)[-1]
        variables = {e["name"]: e.get("value") for e in container["env"]}
        knows = (variables.get("HF_ENDPOINT"), variables.get("SSL_CERT_FILE")) == (
            "https://hub.example.com", "/etc/authority/ca.crt")
        assert knows == (roles[title] == "relocation"), title
        volumes = {v["name"]: v for v in template["spec"]["volumes"]}
        assert {m["name"] for m in container["volumeMounts"]} == volumes.keys(), title
        if knows:
            assert volumes["authority"]["configMap"]["name"] in by_name(found, "ConfigMap")
            assert {"ENVIRONMENT_FILE", "VOLUMES"} <= variables.keys()


def test_the_documented_patch_sets_the_environment_of_the_server(tmp_path: Path) -> None:
    (patch,) = yaml.safe_load(block(r"```yaml\n(patches:.*?)```"))["patches"]
    kind = copy(tmp_path)
    with_entry(kind / "kustomization.yaml", "patches", patch)
    (vllm,) = by_name(render(kind), "Deployment")["model-inference"]["spec"]["template"]["spec"]["containers"]
    variables = {e["name"]: e.get("value") for e in vllm["env"]}
    assert variables["DRAIN_SECONDS"] == "30"
    assert "PIPELINES" in variables


def volumes(root: Path) -> Path:
    """Two volumes of user 10001 as a pod sees them: their roots, and lost+found, belong to root."""
    for volume in ("fine-tuned-model", "dataset"):
        artifact = root / volume / "kind" / "0123456789abcdef"
        artifact.mkdir(parents=True)
        for file in (artifact / "artifact.json", artifact / ".lock-a", artifact / "checkpoints" / "1",
                     artifact.with_name(f".verified-{artifact.name}")):
            file.parent.mkdir(exist_ok=True)
            file.write_text("{}")
        (root / volume / "lost+found").mkdir(mode=0o700)
    return root


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make what belongs to root")
def test_the_documented_backup_can_be_restored_by_a_user_to_whom_the_volumes_roots_do_not_belong() -> None:
    backup = block(r"exec volumes -- (sh -c \"[^\"]*tar [^\"]*\") > backup.tar")
    restore = block(r"exec -i volumes -- (tar [^\n]*) < backup.tar")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        root.chmod(0o755)
        source, target = volumes(root / "source"), root / "target"
        for folder in source.rglob("*"):
            if "lost+found" not in str(folder) and folder.parent != source:
                os.chown(folder, 10001, 10001)
        for volume in ("fine-tuned-model", "dataset"):
            (target / volume).mkdir(parents=True)
            os.chown(target / volume, 0, 10001)
            (target / volume).chmod(0o2775)
        for command, at, files in ((backup, source, {"stdout": root / "backup.tar"}),
                                   (restore, target, {"stdin": root / "backup.tar"})):
            streams: dict[str, Any] = {key: file.open("wb" if key == "stdout" else "rb") for key, file in files.items()}
            done = subprocess.run(["sh", "-c", command.replace("/volumes", str(at))], user=10001, group=10001,
                                  extra_groups=[], stderr=subprocess.PIPE, text=True, check=False, **streams)
            assert (done.returncode, done.stderr) == (0, ""), command
        restored = {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()}
        assert restored == {f"{v}/kind/0123456789abcdef/artifact.json" for v in ("fine-tuned-model", "dataset")}
        assert {(target / v).stat().st_uid for v in ("fine-tuned-model", "dataset")} == {0}


@pytest.mark.parametrize(("overlay", "kind"), [("overlays/gpu", "JobSet"), ("overlays/kind", "Job")])
def test_the_documented_commands_delete_what_is_superseded_and_nothing_else(
        overlay: str, kind: str, tmp_path: Path) -> None:
    names, others = re.findall(r"OVERLAY \| (sed .*?) > names\n.*? \| (grep [^|]*) \|", OPERATIONS)[0]
    current = [m["metadata"]["name"] for m in rendered(overlay) if m["kind"] == kind]
    superseded = [f"{name[:-10]}bbbbbbbbbb" for name in current]
    script = f"{names} > names; printf '%s\\n' {' '.join(current + superseded)} | {others}"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, input=yaml.safe_dump_all(rendered(overlay)), text=True,
                          capture_output=True, check=True)
    assert done.stdout.split() == superseded


def test_the_documented_bucket_credentials_are_those_of_relocation_alone(tmp_path: Path) -> None:
    text = (CHECKOUT / "docs" / "registries.md").read_text().partition("## Buckets")[2]
    (patch,) = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])["patches"]
    kind = copy(tmp_path)
    with_entry(kind / "kustomization.yaml", "patches", patch)
    given = {name for name, account in by_name(render(kind), "ServiceAccount").items()
             if "eks.amazonaws.com/role-arn" in account["metadata"].get("annotations", {})}
    assert given == {"relocation"}


def test_the_documented_bucket_secret_reaches_the_relocation_of_every_adapters_data_alone(tmp_path: Path) -> None:
    text = (CHECKOUT / "docs" / "registries.md").read_text().partition("## Buckets")[2]
    blocks = re.findall(r"```yaml\n# (kustomization|bucket)\.yaml\n(.*?)```", text, re.DOTALL)
    files = dict(blocks)
    kind = copy(tmp_path)
    add_adapter(kind, "cordoba-hotels")
    (kind / "bucket.yaml").write_text(files["bucket"])
    (entry,) = yaml.safe_load(files["kustomization"])["patches"]
    with_entry(kind / "kustomization.yaml", "patches", entry)
    given = {title.removeprefix("Job/")[:-11] for title, template in pod_templates(render(kind)).items()
             if "AWS_ACCESS_KEY_ID" in {e["name"] for e in containers(template)[-1]["env"]}}
    assert given == {f"dataset-relocation-{name}" for name in adapters(kind)}
