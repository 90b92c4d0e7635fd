"""Publication as a component: what it adds to an overlay, and what its pods may do."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

from jobs.core import environment
from jobs.tools import changes, kustomization, overlay
from tests.manifests import CHECKOUT, Manifest, by_name, containers, copy, of_kind, render, restricted_violations
from tests.test_manifests import PRIVATE, PUBLIC, env, mounts, policies, reaches, replace
from tests.validation import problems

ADAPTER = "- ../../../../base/publication/adapter"


@functools.cache
def rendered(overlay: str, *components: str) -> list[Manifest]:
    """An overlay with publication switched on, as a person would."""
    with tempfile.TemporaryDirectory() as place:
        folder = copy(Path(place)).parent / overlay
        text = (folder / "kustomization.yaml").read_text()
        for component in ("publication", *components):
            assert text.count(f"\n# - ../../base/{component} ") == 1
            text = text.replace(f"\n# - ../../base/{component} ", f"\n- ../../base/{component} ")
        (folder / "kustomization.yaml").write_text(text)
        for file in folder.glob("adapters/*/kustomization.yaml"):
            replace(file, f"# {ADAPTER} ", f"{ADAPTER} ")
        return render(folder)


def jobs(manifests: list[Manifest]) -> dict[str, Manifest]:
    return {name: job for name, job in by_name(manifests, "Job").items() if name.startswith("adapter-publication")}


@pytest.mark.parametrize(("overlay", "adapters"), [("kind", ["hostel-guide", "seville-hotels"]),
                                                   ("gpu", ["seville-hotels"])])
def test_each_adapter_has_a_job_that_reads_one_volume_and_writes_none(overlay: str, adapters: list[str]) -> None:
    manifests = rendered(overlay)
    assert sorted(jobs(manifests)) == [f"adapter-publication-{name}" for name in adapters]
    for manifest in manifests:
        assert problems(manifest) == []
    for name, job in jobs(manifests).items():
        template = job["spec"]["template"]
        assert restricted_violations(template) == []
        assert template["spec"]["serviceAccountName"] == "publication"
        assert template["spec"]["automountServiceAccountToken"] is False
        (container,) = containers(template)
        assert container["args"] == ["publish"]
        claims = [volume for volume in template["spec"]["volumes"] if "persistentVolumeClaim" in volume]
        assert [volume["persistentVolumeClaim"]["claimName"] for volume in claims] == ["fine-tuned-model-pvc"]
        assert [path for path, mount in mounts(container).items() if not mount.get("readOnly")] == ["/tmp"], name
        assert job["metadata"]["labels"]["app.kubernetes.io/instance"] == name.removeprefix("adapter-publication-")
        assert env(container)["DOCKER_CONFIG"] in mounts(container)


def test_nothing_else_changes() -> None:
    """Switched on, it starts no other Job again and does not touch serving."""
    def others(manifests: list[Manifest]) -> list[Manifest]:
        return [m for m in manifests if "publication" not in m["metadata"]["name"]]

    assert others(rendered("kind")) == render(CHECKOUT / "overlays" / "kind")


def test_only_publication_sees_the_credentials_with_which_it_writes() -> None:
    """Relocation has others, which need only read; the other stages have none."""
    for name, job in by_name(rendered("kind"), "Job").items():
        template = job["spec"]["template"]
        role = template["metadata"]["labels"]["app.kubernetes.io/component"]
        secrets = [volume["secret"]["secretName"] for volume in template["spec"]["volumes"] if "secret" in volume]
        assert secrets == ([f"{role}-registry"] if role in ("publication", "relocation") else []), name


@pytest.mark.parametrize(("components", "reached"), [((), []), (("publication/public",), PUBLIC)])
def test_publication_reaches_the_place_that_the_overlay_names_and_nothing_private(
        components: tuple[str, ...], reached: list[str]) -> None:
    manifests = rendered("kind", *components)
    for job in jobs(manifests).values():
        template = job["spec"]["template"]
        assert policies(manifests, template, "Ingress") and policies(manifests, template, "Egress")
        for address in [*PUBLIC, *PRIVATE, "169.254.169.254", "fd00:ec2::254"]:
            assert reaches(manifests, template, address, 443) == (address in reached), address
        assert not reaches(manifests, template, PUBLIC[0], 80)
        assert reaches(manifests, template, "10.96.0.10", 53), "DNS"


def test_the_overlay_chooses_the_address(tmp_path: Path) -> None:
    """The patch that docs/publication.md and the policy's comment show."""
    folder = copy(tmp_path)
    replace(folder / "kustomization.yaml", "# - ../../base/publication ", "- ../../base/publication ")
    replace(folder / "adapters/hostel-guide/kustomization.yaml", f"# {ADAPTER} ", f"{ADAPTER} ")
    comment = (CHECKOUT / "base/publication/network-policy.yaml").read_text().partition("#   patches:")[2]
    patch = "patches:" + comment.partition("#\n")[0].replace("\n#   ", "\n")
    with (folder / "kustomization.yaml").open("a") as file:
        file.write(f"\n{patch}")
    manifests = render(folder)
    (job,) = jobs(manifests).values()
    assert reaches(manifests, job["spec"]["template"], "203.0.113.7", 443)
    assert not reaches(manifests, job["spec"]["template"], PUBLIC[0], 443)
    assert len(of_kind(manifests, "NetworkPolicy")) == len(of_kind(rendered("kind"), "NetworkPolicy"))


def test_a_plan_says_when_an_adapter_is_published() -> None:
    loaded = overlay.load(CHECKOUT / "overlays" / "kind")
    adapters = {name: each.pipeline for name, each in loaded.adapters.items()}
    side = changes.Side(loaded.environment.environment, adapters, rendered("kind"))

    def makes(before: changes.Side | None) -> dict[str, tuple[str, ...]]:
        return {run.workload.title: run.makes for run in changes.compare(before, side).runs
                if run.workload.title.startswith("adapter-publication")}

    assert makes(None) == {f"adapter-publication-{name}": (f"{name}/publication",) for name in adapters}
    assert makes(side) == {f"adapter-publication-{name}": () for name in adapters}


def test_check_finds_what_keeps_publication_from_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy(tmp_path)
    adapter = folder / "adapters/hostel-guide/kustomization.yaml"

    def problems() -> list[str]:
        caplog.clear()
        return list(kustomization.publication_without_place(folder, render(folder), environment.load(folder), {}))

    assert problems() == [] and not caplog.text
    replace(adapter, f"# {ADAPTER} ", f"{ADAPTER} ")
    nowhere, no_component = problems()
    assert "environment.yaml does not say where to publish" in nowhere and "component base/publication" in no_component
    with (folder / "environment.yaml").open("a") as file:
        file.write("\npublication: {to: oci://registry.example.com/team}\n")
    replace(folder / "kustomization.yaml", "# - ../../base/publication ", "- ../../base/publication ")
    (no_address,) = problems()
    assert "reach nothing. Patch in the address" in no_address
    replace(folder / "kustomization.yaml", "# - ../../base/publication/public ", "- ../../base/publication/public ")
    assert problems() == [] and not caplog.text
    replace(adapter, f"{ADAPTER} ", f"# {ADAPTER} ")
    assert problems() == [] and "no adapter is: list base/publication/adapter" in caplog.text
