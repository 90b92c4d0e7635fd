"""What the adapter remembers of single records: canaries and train records, against their twins and held-out records.

Everything comes from one reading of each sequence: its loss, and for how many tokens greedy decoding would write the
same. (It writes what is the likeliest after what it wrote, and as long as that is the record, the record itself is what
stands before.) So nothing is generated, and the same sample serves both. The sample follows from hashes of the line
numbers, and only what is sampled is read from the memory-mapped dataset.

Rows hold numbers and positions, never a text.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.core.errors import UserError
from jobs.core.metrics import ALTERNATIVES, MINIMUM_CLUSTERS
from jobs.core.pipeline import Evaluation, Pipeline, Privacy
from jobs.core.progress import Progress
from jobs.data import encoded
from jobs.data.canaries import Canaries
from jobs.data.encoding import Encoded, Record, encode
from jobs.data.split import HOLDOUT, TRAIN
from jobs.evaluation.gate import clusters_of
from jobs.evaluation.holdout import Chosen, JsonLines

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("jobs")

Rows = list[dict[str, Any]]

CANARY, TWIN = "canary", "twin"
PREFIX = 50  # tokens of a plain text that are its prompt, but at most half of it
WORST = 10  # records and canaries that evaluation.json lists


@dataclass(frozen=True)
class Subject:
    """What is read: a canary, its twin, or a record; by the names of the splits."""

    kind: str
    position: int  # the number of a canary or twin; of a record, its line in the dataset's file of the split
    sequences: Sequence[Encoded]
    clusters: Mapping[str, int]  # of a record, by what `evaluation.clusters` can be


@dataclass(frozen=True)
class Subjects:
    """All that is read of one dataset."""

    subjects: Sequence[Subject]
    alternatives: Sequence[Encoded]  # of each canary `ALTERNATIVES`, in order: the canary with other secrets
    verbatim_tokens: int

    @classmethod
    def read(cls, privacy: Privacy, dataset: Path, digest: str, encoded_dataset: Path,
             tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]) -> Subjects:
        """Sample the records, and make the canaries again.

        Args:
            dataset: the folder of the dataset artifact; `digest` is the artifact's.
            encoded_dataset: the folder of the encoded dataset.
            template: the arguments of the chat template.
        """
        sampled = {name: sample(encoded.Split(encoded_dataset / f"{name}.arrow"), privacy.records, digest)
                   for name in (TRAIN, HOLDOUT)}
        clusters = _clusters(dataset, {name: list(found) for name, found in sampled.items()})
        subjects = [Subject(name, line, sequences, clusters[name, line])
                    for name, found in sampled.items() for line, sequences in found.items()]
        canaries = Canaries.of(privacy, digest, dataset)
        if canaries is None:
            return cls(subjects, [], privacy.verbatim_tokens)

        def one(record: Record) -> Encoded:
            return encode(tokenizer, record, template)[-1]

        numbers = range(1, canaries.count + 1)
        made = [Subject(CANARY, number, [one(canaries.record("canary", number))], {}) for number in numbers]
        made += [Subject(TWIN, number, [one(canaries.record("twin", number))], {})
                 for number in range(1, canaries.twins + 1)]
        others = [one(record) for number in numbers for record in canaries.alternatives(number, ALTERNATIVES)]
        return cls([*made, *subjects], others, privacy.verbatim_tokens)

    def measure(self, model: PreTrainedModel, name: str, base: Rows | None = None) -> Rows:
        """The rows of one model (privacy.jsonl).

        Args:
            base: the rows of the base model, for the fine-tuned one: what counts is the loss as a share of the base
                model's, because what is easy to guess has a low loss, trained on or not. None for the base model.
        """
        sequences = [each for subject in self.subjects for each in subject.sequences]
        starts = [continued_from(each) for each in sequences]
        progress = Progress(f"{name}: canaries and records read for privacy", len(sequences) + len(self.alternatives))
        found = iter(readings(model, [*sequences, *self.alternatives],
                              [*starts, *[0] * len(self.alternatives)], progress))
        rows: Rows = []
        for subject in self.subjects:
            own, last = [next(found) for _ in subject.sequences], subject.sequences[-1]
            nats = math.fsum(each.nats for each in own)
            row: dict[str, Any] = {"line": len(rows) + 1, "kind": subject.kind, "position": subject.position,
                                   "nats": nats, "tokens": sum(each.scored for each in subject.sequences),
                                   **subject.clusters}
            if subject.kind in (CANARY, TRAIN):
                row |= {"continued": own[-1].continued, "continuation": len(last) - continued_from(last)}
            if subject.kind == TRAIN and row["continuation"] >= self.verbatim_tokens:
                row["verbatim"] = int(row["continued"] >= self.verbatim_tokens) if math.isfinite(nats) else math.nan
            rows.append(row)
        for row in (row for row in rows if row["kind"] == CANARY):
            row["exposure"] = exposure(row["nats"], [next(found).nats for _ in range(ALTERNATIVES)])
        _attack(rows, base)
        return [{key: None if isinstance(value, float) and not math.isfinite(value) else value
                 for key, value in row.items()} for row in rows]


def continued_from(sequence: Encoded) -> int:
    """The token at which the continuation of a sequence starts: the answer, or a plain text after its first part."""
    return len(sequence.prompt) or min(PREFIX, len(sequence) // 2)


class Reading(NamedTuple):
    """What a model makes of a sequence."""

    nats: float  # the negative log-likelihood of its learned tokens
    continued: int  # the tokens from the start on that greedy decoding would write, too


def exposure(nats: float, others: Sequence[float]) -> float:
    """log2 of how many there are less log2 of the rank, 1 for the likeliest; equal ones share their ranks."""
    if not all(map(math.isfinite, (nats, *others))):
        return math.nan
    rank = 1 + sum(other < nats for other in others) + sum(other == nats for other in others) / 2
    return math.log2(len(others) + 1) - math.log2(rank)


def _attack(rows: Rows, base: Rows | None) -> None:
    """Add to each row the attack's score, higher for what was more likely trained on, and whether it was found.

    The score is the loss divided by the base model's, negated (the ratio of log-perplexities of Carlini et al. 2021).
    Their difference (Watson et al. 2022) is the weaker attack where the base model knows little of the data: on the
    embedded models after 20 epochs its AUC was 0.55, the loss had 0.75 and the ratio 0.78.
    """
    from jobs.evaluation.metrics.privacy import threshold

    for number, row in enumerate(rows):
        score = -row["nats"] / row["tokens"]
        if base is not None:
            before = base[number]
            assert (before["kind"], before["position"]) == (row["kind"], row["position"]), "another sample"
            score /= math.nan if before["nats"] is None else max(before["nats"] / before["tokens"], 1e-9)
        attacked = "canary" if row["kind"] in (CANARY, TWIN) else "record"
        row |= {f"{attacked}_score": score, "member": int(row["kind"] in (CANARY, TRAIN))}
    for attacked in ("canary", "record"):
        own = [row for row in rows if f"{attacked}_score" in row]
        bar = threshold([row[f"{attacked}_score"] for row in own if not row["member"]])
        known = all(math.isfinite(row[f"{attacked}_score"]) for row in own)
        for row in own if bar is not None else []:
            if row["member"]:
                row[f"{attacked}_found"] = int(row[f"{attacked}_score"] > bar) if known else math.nan


def sample(split: encoded.Split, count: int, seed: str) -> dict[int, list[Encoded]]:
    """At most `count` records of a split by line, the same ones on every machine; never a canary."""
    lines = split.records.tolist()
    chosen = set(heapq.nsmallest(count, {line for line in lines if line > 0},
                                 lambda line: hashlib.sha256(f"{seed} {line}".encode()).digest()))
    found: dict[int, list[Encoded]] = {line: [] for line in sorted(chosen)}
    for place, line in enumerate(lines):
        if line in chosen:
            found[line].append(split[place])
    return found


def readings(model: PreTrainedModel, sequences: Sequence[Encoded], starts: Sequence[int],
             progress: Progress) -> list[Reading]:
    """Read each sequence once.

    Args:
        starts: the token of each sequence from which on the continuation is counted.
    """
    from jobs.evaluation.scoring import scored_tokens

    results = [Reading(0.0, 0)] * len(sequences)
    for batch in scored_tokens(model, sequences):
        for row, (i, nats) in enumerate(zip(batch.sequences, batch.sums(batch.nats), strict=True)):
            right = batch.likeliest[(batch.rows == row) & (batch.places >= starts[i])].tolist()
            results[i] = Reading(nats, right.index(False) if False in right else len(right))
        progress.add(len(batch.sequences))
    return results


def _clusters(dataset: Path, lines: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], dict[str, int]]:
    """The numbers of each record's clusters, by split and line."""
    from jobs.evaluation.confidence import Clusters

    places = [(name, line) for name, of_split in lines.items() for line in of_split]
    records = [record for name, of_split in lines.items()
               for record in Chosen(JsonLines(dataset / f"{name}.jsonl"), of_split)]
    numbers = {by: Clusters.of(clusters_of(records, by)).of_row.tolist() for by in ("answer", "record")}
    return {place: {f"{by}_cluster": numbers[by][n] for by in numbers} for n, place in enumerate(places)}


def with_clusters(rows: Rows, by: str) -> Rows:
    """The rows with the cluster of each record as `evaluation.clusters` says."""
    return [row | ({"cluster": row[f"{by}_cluster"]} if f"{by}_cluster" in row else {}) for row in rows]


def summary(pipeline: Pipeline, rows: Rows) -> dict[str, Any]:
    """The part `privacy` of evaluation.json: settings, how many of each kind were read, and the worst, by position.

    `worst_canaries` have the highest exposure; `worst_records` are the train records most surely found, and
    `longest_verbatim` those with the longest continuation, in tokens.
    """
    assert pipeline.evaluation.privacy is not None, "only where it is measured"
    kinds = [row["kind"] for row in rows]

    def worst(kind: str, key: str, *others: str) -> list[dict[str, Any]]:
        found = [row for row in rows if row["kind"] == kind and row.get(key)]
        found.sort(key=lambda row: (-row[key], row["position"]))
        return [{name: row[name] for name in ("position", key, *others)} for row in found[:WORST]]

    return {**pipeline.evaluation.privacy.model_dump(),
            "counts": {kind: kinds.count(kind) for kind in (CANARY, TWIN, TRAIN, HOLDOUT)},
            "worst_canaries": worst(CANARY, "exposure", "continued", "continuation"),
            "worst_records": worst(TRAIN, "record_score"),
            "longest_verbatim": worst(TRAIN, "continued", "continuation")}


def check_held_out(evaluation: Evaluation, records: int) -> None:
    """Refuse rules that so many held-out records cannot decide.

    Raises:
        UserError: naming the rule, and how many records it needs.
    """
    from jobs.evaluation.metrics.privacy import MINIMUM_NEGATIVES

    for key, needed, why in (
            ("privacy.membership_tpr", MINIMUM_NEGATIVES, "1 % of fewer is none; better are a thousand"),
            ("privacy.membership_auc", MINIMUM_CLUSTERS, "fewer cannot prove anything")):
        if key in evaluation.gate and records < needed:
            raise UserError(f"evaluation.gate.{key}: {records} held-out records are too few, at least {needed} are "
                            f"needed: {why}. Raise dataset.holdout, bring more records, or remove the rule")


def check_encoded(evaluation: Evaluation, dataset: Path, digest: str, folder: Path) -> None:
    """Refuse rules that the records, as they were encoded, cannot decide.

    Args:
        dataset: the folder of the dataset artifact; `digest` is the artifact's.
        folder: that of the encoded dataset.
    Raises:
        UserError: naming the rule.
    """
    privacy = evaluation.privacy
    rules = [key for key in evaluation.gate if key.startswith(("privacy.membership", "privacy.verbatim"))]
    if privacy is None or not rules:
        return
    found = {name: sample(encoded.Split(folder / f"{name}.arrow"), privacy.records, digest)
             for name in (TRAIN, HOLDOUT)}
    check_held_out(evaluation, len(found[HOLDOUT]))
    clusters = _clusters(dataset, {name: list(records) for name, records in found.items()})
    long = [line for line, (*_, last) in found[TRAIN].items()
            if len(last) - continued_from(last) >= privacy.verbatim_tokens]
    for key in rules:
        verbatim = key == "privacy.verbatim"
        for name, lines in ((TRAIN, long),) if verbatim else ((name, list(of)) for name, of in found.items()):
            count = len({clusters[name, line][f"{evaluation.clusters}_cluster"] for line in lines})
            if count < MINIMUM_CLUSTERS:
                what = f" with answers of at least {privacy.verbatim_tokens} tokens" if verbatim else ""
                remedy = "Lower evaluation.privacy.verbatim_tokens" if verbatim else "Bring more records"
                raise UserError(f"evaluation.gate.{key}: the {len(lines)} {name} records{what} are in {count} "
                                f"clusters, at least {MINIMUM_CLUSTERS} are needed. A cluster is a `group`, or the "
                                f"records with the same answer. {remedy}, or, if answers are labels that repeat, set "
                                "evaluation.clusters: record")
