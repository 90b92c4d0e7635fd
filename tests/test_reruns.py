"""Whatever is edited in git, in whatever combination: exactly the Jobs run again for which something changed.

A Job runs again when its name changes. tests/test_manifests.py has single edits by hand; these are random ones.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jobs.core.files import sha256_of
from tests.manifests import CHECKOUT, Manifest, copy, of_kind, render, unhashed

RELOCATION = {"dataset-relocation", "model-relocation", "tokenizer-relocation", "model-reference-relocation"}
OFFLINE = {"model-training", "model-evaluation"}
ALL = RELOCATION | OFFLINE
NONE: set[str] = set()
KIND, PATCHES = "overlays/kind", "base/patches"

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
    # the pipeline: all Jobs, even for a comment, because what they run with is the file's text
    Place(f"{KIND}/pipeline.yaml", r"adapter: (\S+)", WORDS, ALL),
    Place(f"{KIND}/pipeline.yaml", r"{r: (\d+)", NUMBERS, ALL),
    Place(f"{KIND}/pipeline.yaml", r"epochs: (\d+)", NUMBERS, ALL),
    Place(f"{KIND}/pipeline.yaml", r"learning_rate: (\S+)", st.floats(1e-6, 0.1).map(str), ALL),
    Place(f"{KIND}/pipeline.yaml", r"seed: (\d+)", NUMBERS, ALL),
    Place(f"{KIND}/pipeline.yaml", r"max_ratio: ([\d.]+)", st.floats(0.1, 2).map(str), ALL),
    comment(CHECKOUT / KIND / "pipeline.yaml", ALL),
    # what several Jobs have in common
    Place(f"{PATCHES}/job.yaml", r"backoffLimit: (\d+)", NUMBERS, ALL),
    Place(f"{PATCHES}/job.yaml", r"HF_HOME, value: (\S+)}", WORDS.map("/tmp/{}".format), ALL),
    Place(f"{PATCHES}/relocation.yaml", r"secretKeyRef: {name: (\S+),", WORDS, RELOCATION),
    Place(f"{PATCHES}/offline.yaml", r'TRANSFORMERS_OFFLINE, value: "(\d+)"', NUMBERS, OFFLINE),
    Place(f"{KIND}/one-thread.yaml", r'OMP_NUM_THREADS, value: "(\d+)"', NUMBERS, ALL),
    Place(f"{KIND}/kustomization.yaml", r"newName: (lora-gitops-jobs)\n", WORDS.map("example.com/{}".format), ALL),
    # one Job
    *(Place(f"base/{job}.yaml", r"memory: (\w+)", MEMORY, {job}) for job in sorted(ALL)),
    Place("base/model-training.yaml", r"terminationGracePeriodSeconds: (\d+)", NUMBERS, {"model-training"}),
]
# Nothing that a Job is made of.
UNRELATED = [
    Place(f"{KIND}/kustomization.yaml", r"newName: (lora-gitops-serving)\n", WORDS.map("example.com/{}".format), NONE),
    Place(f"{KIND}/vllm-cpu.yaml", r"--max-model-len=(\d+)", NUMBERS, NONE),
    Place("serving/deployment.yaml", r"memory: (\w+)", MEMORY, NONE),
    Place("base/tensorboard.yaml", r"memory: (\w+)", MEMORY, NONE),
    Place("base/volumes.yaml", r"storage: (\w+)", MEMORY, NONE),
    Place("base/network-policies.yaml", r"protocol: TCP, port: (443)", st.integers(1, 65535).map(str), NONE),
]
REMARKS = [comment(file, NONE) for part in ("base", "serving", KIND)
           for file in sorted((CHECKOUT / part).rglob("*.yaml")) if file.name != "pipeline.yaml"]
PIN = Place(f"{KIND}/pipeline.yaml", r"sha256: (\w+)", st.nothing(), ALL)  # goes with the data
Edits = list[tuple[Place, str]]

# A failure is shown as it was found: at half a second each, looking for a smaller one would take minutes.
RANDOM = settings(deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])


def jobs_of(kind: Path) -> dict[str, Manifest]:
    """The Jobs by their names without the hash."""
    return {unhashed(job): job for job in of_kind(render(kind), "Job")}


@functools.cache
def committed() -> dict[str, Manifest]:
    return jobs_of(CHECKOUT / KIND)


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
            kind = copy(Path(folder))
            for place, value in [*left, *unrelated, *remarks]:
                place.edit(Path(folder), value)
            assert changed(jobs_of(kind)) == NONE.union(*(place.jobs for place, _ in left))


@settings(RANDOM, max_examples=5)
@given(st.lists(st.tuples(COMMENTS, COMMENTS), min_size=1, max_size=5), st.booleans())
def test_new_data_starts_every_job_with_its_pin_or_without(records: list[tuple[str, str]], pinned: bool) -> None:
    """Without its pin, the new Job says so and fails. Under the old name it would be refused as a change of a Job."""
    with tempfile.TemporaryDirectory() as folder:
        kind = copy(Path(folder))
        with (kind / "dataset.jsonl").open("a", encoding="utf-8") as stream:
            for prompt, completion in records:
                record = {"prompt": f"?{prompt}", "completion": f"!{completion}"}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        if pinned:
            PIN.edit(Path(folder), sha256_of(kind / "dataset.jsonl"))
        assert changed(jobs_of(kind)) == ALL
