"""Whatever is edited in git, in whatever combination: exactly the Jobs run again for which something changed.

A Job runs again when its name changes. tests/test_manifests.py has single edits by hand; these are random ones.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jobs.core.files import sha256_of
from tests.manifests import (
    ADAPTER_JOBS,
    CHECKOUT,
    ENVIRONMENT_JOBS,
    Manifest,
    adapters,
    add_adapter,
    copy,
    jobs_of,
    of_kind,
    render,
    unhashed,
)

KIND = "overlays/kind"
OTHER = "cordoba-hotels"  # an adapter that each copy gets beside the committed ones
NAMES = [OTHER, *adapters(CHECKOUT / KIND)]
MINE = "seville-hotels"  # the adapter whose files are edited
PIPELINE = f"{KIND}/adapters/{MINE}/pipeline.yaml"


def of_all(jobs: set[str]) -> set[str]:
    """These Jobs of every adapter."""
    return {f"{job}-{name}" for job in jobs for name in NAMES}


RELOCATION = ENVIRONMENT_JOBS | of_all({"dataset-relocation"})
OFFLINE = of_all({"dataset-encoding", "model-training", "model-evaluation"})
ALL = RELOCATION | OFFLINE
OWN = jobs_of(MINE)
NONE: set[str] = set()

NUMBERS = st.integers(1, 2**31 - 1).map(str)
MEMORY = st.integers(64, 4096).map(lambda n: f"{n}Mi")
WORDS = st.from_regex(r"[a-z]{1,20}", fullmatch=True)
# All that can stand in a comment; not what some readers of YAML take for the end of the line.
COMMENTS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn", "Co", "Zl", "Zp"], exclude_characters="\ufeff"),
                   max_size=40)


@dataclass(frozen=True)
class Place:
    """Something that can be edited."""

    file: str
    pattern: str  # its first match is edited, in the group
    values: st.SearchStrategy[str]
    jobs: set[str]  # which run again

    def edit(self, root: Path, value: str) -> None:
        file = root / self.file
        text = file.read_text()
        found = re.search(self.pattern, text)
        assert found, f"{self.file} has no {self.pattern}"
        file.write_text(text[:found.start(1)] + value + text[found.end(1):])

    def others(self) -> st.SearchStrategy[str]:
        """Values other than the committed one."""
        found = re.search(self.pattern, (CHECKOUT / self.file).read_text())
        assert found, f"{self.file} has no {self.pattern}"
        return self.values.filter(lambda value: value != found[1])


def comment(file: Path, jobs: set[str]) -> Place:
    return Place(str(file.relative_to(CHECKOUT)), r"()\Z", COMMENTS.map("\n#{}".format), jobs)


RELATED = [
    # an adapter's pipeline: all of its Jobs, even for a comment, because what they run with is the file's text
    Place(PIPELINE, r"adapter: (\S+)", WORDS, OWN),
    Place(PIPELINE, r"{r: (\d+)", NUMBERS, OWN),
    Place(PIPELINE, r"epochs: (\d+)", NUMBERS, OWN),
    Place(PIPELINE, r"learning_rate: (\S+)", st.floats(1e-6, 0.1).map(str), OWN),
    Place(PIPELINE, r"seed: (\d+)", NUMBERS, OWN),
    Place(PIPELINE, r"max_ratio: ([\d.]+)", st.floats(0.1, 2).map(str), OWN),
    comment(CHECKOUT / PIPELINE, OWN),
    # the environment: all Jobs
    Place(f"{KIND}/environment.yaml", r"\n  source: (builtin:tiny)\n", WORDS.map("file:{}".format), ALL),
    Place(f"{KIND}/environment.yaml", r"max_lora_rank: (\d+)", NUMBERS, ALL),
    Place(f"{KIND}/environment.yaml", r"keep: (\d+)", NUMBERS, ALL),
    comment(CHECKOUT / KIND / "environment.yaml", ALL),
    # what several Jobs have in common
    Place("base/jobs/job.yaml", r"backoffLimit: (\d+)", NUMBERS, ALL),
    Place("base/jobs/job.yaml", r"HF_HOME, value: (\S+)}", WORDS.map("/tmp/{}".format), ALL),
    Place("base/jobs/relocation.yaml", r"secretKeyRef: {name: (\S+),", WORDS, RELOCATION),
    Place("base/jobs/offline.yaml", r'TRANSFORMERS_OFFLINE, value: "(\d+)"', NUMBERS, OFFLINE),
    Place("base/adapter/pipeline/pipeline.yaml", r"name: PIPELINE, value: (\S+)}", WORDS.map("/etc/{}".format),
          of_all(ADAPTER_JOBS)),
    Place(f"{KIND}/cpu/one-thread.yaml", r'OMP_NUM_THREADS, value: "(\d+)"', NUMBERS, ALL),
    Place(f"{KIND}/kustomization.yaml", r"newName: (lora-gitops-jobs)\n", WORDS.map("example.com/{}".format), ALL),
    Place("base/metadata/kustomization.yaml", r"version: (\S+)", WORDS, ALL),
    # one stage
    *(Place(f"base/environment/{job}.yaml", r"memory: (\w+)", MEMORY, {job}) for job in sorted(ENVIRONMENT_JOBS)),
    *(Place(f"base/adapter/{job}.yaml", r"memory: (\w+)", MEMORY, of_all({job})) for job in sorted(ADAPTER_JOBS)),
    Place("base/adapter/model-training.yaml", r"terminationGracePeriodSeconds: (\d+)", NUMBERS,
          of_all({"model-training"})),
]
# Nothing that a Job is made of.
UNRELATED = [
    Place(f"{KIND}/kustomization.yaml", r"newName: (lora-gitops-serving)\n", WORDS.map("example.com/{}".format), NONE),
    Place(f"{KIND}/cpu/vllm-cpu.yaml", r"--max-model-len=(\d+)", NUMBERS, NONE),
    Place("serving/deployment.yaml", r"memory: (\w+)", MEMORY, NONE),
    Place("base/environment/tensorboard.yaml", r"memory: (\w+)", MEMORY, NONE),
    Place("base/environment/volumes.yaml", r"storage: (\w+)", MEMORY, NONE),
    Place("base/environment/network-policies.yaml", r'matchLabels: {tensorboard-client: "(\w+)"}', WORDS, NONE),
]
REMARKS = [comment(file, NONE) for part in ("base", "serving", KIND)
           for file in sorted((CHECKOUT / part).rglob("*.yaml"))
           if file.name not in ("pipeline.yaml", "environment.yaml")]
PIN = Place(PIPELINE, r"sha256: (\w+)", st.nothing(), OWN)  # goes with the data
Edits = list[tuple[Place, str]]

# A failure is shown as it was found: at half a second each, looking for a smaller one would take minutes.
RANDOM = settings(deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])


def copied(folder: Path) -> Path:
    """The committed overlay, with another adapter."""
    shutil.rmtree(folder / KIND, ignore_errors=True)
    kind = copy(folder)
    add_adapter(kind, OTHER)
    return kind


def jobs_in(kind: Path) -> dict[str, Manifest]:
    """The Jobs by their names without the hash."""
    return {unhashed(job): job for job in of_kind(render(kind), "Job")}


@functools.cache
def committed() -> dict[str, Manifest]:
    with tempfile.TemporaryDirectory() as folder:
        return jobs_in(copied(Path(folder)))


SEEN: dict[str, str] = {}  # every Job that was rendered, by its name: what it is, without the name


def changed(jobs: dict[str, Manifest]) -> set[str]:
    """Which Jobs run again: those with another name than the committed ones.

    One name means one Job, and one Job has one name, in the whole history of edits.
    """
    for job in [*committed().values(), *jobs.values()]:
        content = json.dumps(job | {"metadata": job["metadata"] | {"name": ""}}, sort_keys=True)
        name = job["metadata"]["name"]
        assert SEEN.setdefault(name, content) == content, f"{name} would be changed in place, which is refused"
    assert len(set(SEEN.values())) == len(SEEN), "a Job that did not change would run again"
    assert jobs.keys() == committed().keys()
    return {job for job in jobs if jobs[job]["metadata"]["name"] != committed()[job]["metadata"]["name"]}


def edits(places: list[Place], least: int, most: int) -> st.SearchStrategy[Edits]:
    """New values for so many of the places."""
    return st.lists(st.sampled_from(places), min_size=least, max_size=most, unique_by=id).flatmap(
        lambda chosen: st.tuples(*(st.tuples(st.just(place), place.others()) for place in chosen)).map(list))


@settings(RANDOM, max_examples=20)
@given(edits(RELATED, 1, 3), edits(UNRELATED, len(UNRELATED), len(UNRELATED)), edits(REMARKS, 0, 5))
def test_exactly_the_jobs_run_again_for_which_something_changed_and_undoing_brings_them_back(
        related: Edits, unrelated: Edits, remarks: Edits) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for left in (related, []):  # with the edits that concern Jobs, and without them again
            kind = copied(Path(folder))
            for place, value in [*left, *unrelated, *remarks]:
                place.edit(Path(folder), value)
            assert changed(jobs_in(kind)) == NONE.union(*(place.jobs for place, _ in left))


@settings(RANDOM, max_examples=5)
@given(st.lists(st.tuples(COMMENTS, COMMENTS), min_size=1, max_size=5), st.booleans())
def test_new_data_starts_every_job_of_its_adapter_with_its_pin_or_without(
        records: list[tuple[str, str]], pinned: bool) -> None:
    """Without its pin, the new Job says so and fails. Under the old name it would be refused as a change of a Job."""
    with tempfile.TemporaryDirectory() as folder:
        kind = copied(Path(folder))
        with (kind / "adapters" / MINE / "dataset.jsonl").open("a", encoding="utf-8") as stream:
            for prompt, completion in records:
                record = {"prompt": f"?{prompt}", "completion": f"!{completion}"}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        if pinned:
            PIN.edit(Path(folder), sha256_of(kind / "adapters" / MINE / "dataset.jsonl"))
        assert changed(jobs_in(kind)) == OWN


@settings(RANDOM, max_examples=5)
@given(st.from_regex(r"[a-z][a-z0-9-]{0,30}[a-z0-9]", fullmatch=True).filter(lambda name: name not in NAMES))
def test_an_added_adapter_starts_its_own_jobs_only_and_a_removed_one_takes_no_other_along(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kind = copied(Path(folder))
        add_adapter(kind, name)
        jobs = jobs_in(kind)
        assert jobs.keys() - committed().keys() == jobs_of(name)
        assert {job: jobs[job] for job in committed()} == committed()
