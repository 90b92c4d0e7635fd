"""What measuring costs, beside one record at a time: `python -m benchmarks.evaluation --help`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.serving import progress
from jobs.core import pipeline
from jobs.core.command import run_command
from jobs.core.errors import RetryableError, UserError
from jobs.core.plan import Plan, plan
from jobs.tools.pods import CHECKOUT

DESCRIPTION = """\
Measure base, fine-tuned and reference model on held-out data: perplexity, answers with ROUGE, and acceptability.

Two ways do the same work in turn, each in a process of its own: ours, as the stage `evaluate` does it, and one record
at a time, as the project's ancestor did: a forward pass for each record and each sentence, `generate` for each
question, metrics through `evaluate`. Their values must be the same. Then: how long a verdict on 10,000 records takes.
"""
OURS, BEFORE = "ours", "one at a time"
OVERLAY = CHECKOUT / "overlays" / "kind"
ADAPTER = OVERLAY / "adapters" / "seville-hotels" / "pipeline.yaml"
GATE = {"perplexity": {"max_ratio": 0.9}, "rougeL": {"min_gain": 0.05}, "acceptability_mcc": {"max_drop": 0.1}}
PARTS = ("imports", "loading", "measuring")


@dataclass(frozen=True)
class Cost:
    """Seconds of a processor, and of a clock."""

    processor: float
    wall: float


@dataclass
class Clock:
    """What the parts of a process's work cost. The parts of several models add up."""

    costs: dict[str, Cost] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = time.process_time(), time.perf_counter()
        yield
        spent = self.costs.get(name, Cost(0.0, 0.0))
        self.costs[name] = Cost(spent.processor + time.process_time() - before[0],
                                spent.wall + time.perf_counter() - before[1])


@dataclass(frozen=True)
class Run:
    """One way, once: what each part cost, and what each model's values are."""

    costs: Mapping[str, Cost]
    values: Mapping[str, Mapping[str, Any]]  # by model: records' and sentences' numbers, answers, scores

    def cost(self, parts: Sequence[str]) -> Cost:
        """The cost of some parts."""
        return Cost(sum(self.costs[part].processor for part in parts), sum(self.costs[part].wall for part in parts))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=DESCRIPTION, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--rounds", type=int, default=5, metavar="N", help="runs of each way (default: %(default)s)")
    top.add_argument("--pipeline", type=Path, default=ADAPTER, metavar="FILE",
                     help="whose models and data to measure with (default: seville-hotels of overlays/kind)")
    top.add_argument("--volumes", type=Path, metavar="DIR",
                     help="where they lie, relocated and trained (default: made now, which takes some minutes)")
    top.add_argument("--records", type=int, default=10_000, metavar="N",
                     help="held-out records of the verdict (default: %(default)s)")
    top.add_argument("--quick", action="store_true", help="tiny random models, one round: shows that it works")
    top.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return top


# --- the ways --------------------------------------------------------------------------------------------------------


def measure_ours(clock: Clock, settings: pipeline.Pipeline, wanted: Plan, volumes: Path) -> dict[str, Any]:
    """As jobs/evaluation/evaluate.py measures."""
    with clock.part("imports"):
        from jobs.core import models
        from jobs.core.imports import fast_imports
        from jobs.data import encoded
        from jobs.evaluation import scoring
        from jobs.evaluation.metrics import acceptability, perplexity, rouge  # noqa: F401

        with fast_imports():
            from peft import PeftModel

    found: dict[str, Any] = {}

    def measure(role: str, model: Any, tokenizer: Any, material: Any) -> None:
        with clock.part("measuring"):
            measured = scoring.measure(model, tokenizer, material, role)
        records, sentences = measured.values["records"], measured.values["sentences"]
        found[role] = {"nats": [row["nats"] for row in records], "tokens": [row["tokens"] for row in records],
                       "answers": [each["answer"] for each in measured.generations],
                       "sentences": [row["score"] for row in sentences],
                       "scores": {key: measured.summary[key] for key in ("perplexity", "rougeL", "acceptability_mcc")}}

    with clock.part("measuring"):
        material = scoring.Material.read(
            wanted.dataset.path(volumes), wanted.acceptability.path(volumes), max_length=settings.training.max_length,
            max_new_tokens=settings.evaluation.max_new_tokens, template=settings.environment.chat_template)
        holdout = encoded.Split(wanted.encoded_dataset.path(volumes) / "holdout.arrow")
    with clock.part("loading"):
        tokenizer = models.load_tokenizer(wanted.tokenizer.path(volumes))
        adapted = PeftModel.from_pretrained(models.load_model(wanted.base_model.path(volumes)),
                                            str(wanted.adapter.path(volumes))).eval()
    with adapted.disable_adapter():
        measure("base", adapted, tokenizer, dataclasses.replace(material, encoded=holdout))
    measure("fine_tuned", adapted, tokenizer, dataclasses.replace(material, encoded=holdout))
    with clock.part("loading"):
        reference = wanted.reference_model.path(volumes)
        model, tokenizer = models.load_model(reference), models.load_tokenizer(reference)
    measure("reference", model, tokenizer, material)
    return found


def measure_one_at_a_time(clock: Clock, settings: pipeline.Pipeline, wanted: Plan, volumes: Path) -> dict[str, Any]:
    """As it is usually written down: transformers, PEFT and evaluate, and a loop. Each model is loaded by itself."""
    with clock.part("imports"):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from jobs.data.encoding import answer, encode
        from jobs.evaluation.metrics import compute
        from jobs.evaluation.metrics.reusable import Acceptability, Perplexity, Rouge

    with clock.part("measuring"):
        dataset, sentences = ([json.loads(line) for line in (spec.path(volumes) / file).open(encoding="utf-8")]
                              for spec, file in ((wanted.dataset, "holdout.jsonl"),
                                                 (wanted.acceptability, "acceptability.jsonl")))

    def negative_log_likelihood(model: Any, tokens: Sequence[int], first: int) -> float:
        ids = torch.tensor([list(tokens)])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, first - 1 : -1].float()
        return float(torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum"))

    def measure(role: str, model: Any, tokenizer: Any) -> None:
        nats, counts, bytes_, answers, references, scores = [], [], [], [], [], []
        with clock.part("measuring"):
            for record in dataset:
                (sequence,) = encode(tokenizer, record, settings.environment.chat_template)
                if len(sequence.tokens) > settings.training.max_length:
                    continue
                prompt = list(sequence.prompt)
                nats.append(negative_log_likelihood(model, sequence.tokens, len(prompt)))
                counts.append(len(sequence.completion))
                bytes_.append(len(answer(record).encode()))
                with torch.no_grad():
                    written = model.generate(input_ids=torch.tensor([prompt]), do_sample=False,
                                             attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                             max_new_tokens=settings.evaluation.max_new_tokens,
                                             eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
                answers.append(tokenizer.decode(written[0, len(prompt):], skip_special_tokens=True).strip())
                references.append(answer(record))
            for sentence in sentences:
                ids = tokenizer(sentence["text"])["input_ids"]
                scores.append(-negative_log_likelihood(model, ids, 1) / (len(ids) - 1))
            found[role] = {"nats": nats, "tokens": counts, "answers": answers, "sentences": scores, "scores": {
                key: value for metric, inputs in (
                    (Perplexity, {"nll": nats, "special": [0.0] * len(nats), "tokens": counts, "bytes": bytes_}),
                    (Rouge, {"predictions": answers, "references": references}),
                    (Acceptability, {"texts": [each["text"] for each in sentences], "predictions": scores,
                                     "references": [each["acceptable"] for each in sentences]}))
                for key, value in compute(metric, **inputs).items()
                if key in ("perplexity", "rougeL", "acceptability_mcc")}}

    found: dict[str, Any] = {}
    base, reference = wanted.base_model.path(volumes), wanted.reference_model.path(volumes)
    for role, folder, tokens in (("base", base, wanted.tokenizer.path(volumes)),
                                 ("fine_tuned", base, wanted.tokenizer.path(volumes)),
                                 ("reference", reference, reference)):
        with clock.part("loading"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            if role == "fine_tuned":
                model = PeftModel.from_pretrained(model, str(wanted.adapter.path(volumes)))
            model, tokenizer = model.eval(), AutoTokenizer.from_pretrained(tokens)
        measure(role, model, tokenizer)
    return found


WAYS: dict[str, Callable[[Clock, pipeline.Pipeline, Plan, Path], dict[str, Any]]] = {
    OURS: measure_ours, BEFORE: measure_one_at_a_time}


def run_way(way: str, file: Path, volumes: Path) -> dict[str, Any]:
    """What a process prints: its costs and values."""
    settings = pipeline.load(file).pipeline
    clock = Clock()
    values = WAYS[way](clock, settings, plan(settings), volumes)
    return {"costs": {part: [cost.processor, cost.wall] for part, cost in clock.costs.items()}, "values": values}


# --- measuring -------------------------------------------------------------------------------------------------------


def started(way: str, file: Path, volumes: Path) -> Run:
    """Run one way in a process with one thread.

    Raises:
        RetryableError: it ended with an error, which is above.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.evaluation", "--way", way, "--pipeline", str(file), "--volumes",
         str(volumes)], stdout=subprocess.PIPE, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
                          "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"})
    if done.returncode:
        raise RetryableError(f"{way} failed; its error is above")
    read = json.loads(done.stdout.splitlines()[-1])
    return Run({part: Cost(*cost) for part, cost in read["costs"].items()}, read["values"])


def measure(file: Path, volumes: Path, rounds: int) -> dict[str, list[Run]]:
    """Both ways, in turn."""
    found: dict[str, list[Run]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in list(WAYS)[:: 1 if number % 2 == 0 else -1]:
            progress(f"round {number + 1} of {rounds}: {way}")
            found[way].append(started(way, file, volumes))
    return found


def differences(one: Run, other: Run) -> dict[str, float]:
    """How far the values of two ways are apart: the largest relative difference of a record's or sentence's number and
    of a score, and how many answers differ.

    Raises:
        UserError: they did not measure the same records.
    """
    largest = {"numbers": 0.0, "scores": 0.0, "answers": 0.0}
    for role, mine in one.values.items():
        theirs = other.values[role]
        if mine["tokens"] != theirs["tokens"] or len(mine["sentences"]) != len(theirs["sentences"]):
            raise UserError(f"{role}: the ways did not measure the same tokens")
        numbers = [pair for key in ("nats", "sentences") for pair in zip(mine[key], theirs[key], strict=True)]
        scores = [(mine["scores"][key], theirs["scores"][key]) for key in mine["scores"]]
        for name, pairs in (("numbers", numbers), ("scores", scores)):
            largest[name] = max(largest[name], *(abs(a - b) / max(abs(a), abs(b), 1e-9) for a, b in pairs))
        largest["answers"] += sum(a != b for a, b in zip(mine["answers"], theirs["answers"], strict=True))
    return largest


def table(found: Mapping[str, Sequence[Run]]) -> list[str]:
    """A Markdown table: medians of the seconds, and the ratios within a round."""
    lines = [f"| | {OURS}: processor, s | wall, s | {BEFORE}: processor, s | wall, s | ratio, processor | wall |",
             "|---|---|---|---|---|---|---|"]
    for name, parts in (*((part, (part,)) for part in PARTS), ("all", PARTS)):
        costs = {way: [run.cost(parts) for run in runs] for way, runs in found.items()}
        cells = [f"{statistics.median(getattr(cost, kind) for cost in costs[way]):.2f}"
                 for way in WAYS for kind in ("processor", "wall")]
        for kind in ("processor", "wall"):
            ratio = figures.ratios([getattr(cost, kind) for cost in costs[BEFORE]],
                                   [getattr(cost, kind) for cost in costs[OURS]])
            cells.append(f"{ratio.middle:.1f} ({ratio.low:.1f} to {ratio.high:.1f})")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def verdict_seconds(records: int, sentences: int = 1000) -> dict[str, Cost]:
    """What it costs to check each rule of a gate on made-up values of so many records, each a cluster of its own."""
    import numpy as np

    from jobs.evaluation import gate

    random = np.random.default_rng(0)
    tokens = random.integers(5, 60, records)
    models: dict[str, gate.Values] = {}
    for role, nats, share in (("base", 3.0, 0.3), ("fine_tuned", 1.0, 0.6)):
        rouge = random.beta(4 * share, 4 * (1 - share), records)
        score = random.normal(size=sentences)
        models[role] = {
            "records": [{"line": line, "nats": float(total), "special_nats": 0.0, "tokens": int(count), "bytes": 4,
                         **dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), float(value))}
                        for line, (total, count, value) in enumerate(
                            zip(random.gamma(nats * tokens), tokens, rouge, strict=True), 1)],
            "sentences": [{"line": line, "score": float(value), "acceptable": int(value > 0), "half": line % 2}
                          for line, value in enumerate(score, 1)]}
    clusters: list[gate.Cluster] = [("record", line) for line in range(1, records + 1)]
    found = {}
    for key, rule in GATE.items():
        clock = Clock()
        with clock.part(key):
            gate.evaluate_gate(pipeline.Evaluation.model_validate({"gate": {key: rule}}), models, clusters)
        found[key] = clock.costs[key]
    return found


def make_volumes(folder: Path) -> None:
    """Relocate, encode and train as the Jobs of overlays/kind do."""
    for of_environment in (True, False):
        file = ["--environment", str(OVERLAY / "environment.yaml")] if of_environment else ["--pipeline", str(ADAPTER)]
        stages = ([["relocate", name] for name in ("base-model", "tokenizer", "reference-model")] if of_environment
                  else [["relocate", "dataset"], ["encode"], ["train"]])
        for stage in stages:
            progress(" ".join(stage))
            subprocess.run([sys.executable, "-m", "jobs", *file, "--volumes", str(folder), *stage], check=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def run(args: argparse.Namespace) -> None:
    if args.way:
        print(json.dumps(run_way(args.way, args.pipeline, args.volumes)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-evaluation-") as temporary:
        file, volumes = args.pipeline, args.volumes or Path(temporary)
        if args.quick:
            from tests.build_models import published_pipeline

            loaded, volumes = published_pipeline(Path(temporary))
            file = loaded.path
        elif args.volumes is None:
            make_volumes(volumes)
        found = measure(file, volumes, 1 if args.quick else args.rounds)
    far = differences(found[OURS][0], found[BEFORE][0])
    print("\n".join(table(found)))
    print(f"\nLargest relative difference of a record's or sentence's value: {far['numbers']:.0e}, of a score: "
          f"{far['scores']:.0e}. Answers that differ: {far['answers']:.0f}.\n")
    records = 200 if args.quick else args.records
    print(f"| rule on {records:,} records, each a cluster | processor, s | wall, s |\n|---|---|---|")
    for key, cost in verdict_seconds(records).items():
        print(f"| {key} {json.dumps(GATE[key])} | {cost.processor:.2f} | {cost.wall:.2f} |")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
