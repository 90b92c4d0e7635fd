"""Promises of the privacy metrics: each number is what its definition says, its interval keeps what it promises, an
adapter that learned by heart fails, and no private text leaves the data."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.core import artifacts, models, pipeline
from jobs.core.errors import UserError
from jobs.core.metrics import ALTERNATIVES, PRIVACY
from jobs.core.plan import plan
from jobs.core.progress import Progress
from jobs.data import encoded
from jobs.data.encoding import Encoded
from jobs.evaluation import evaluate, privacy, scoring
from jobs.evaluation.confidence import Clusters, Proportion, interval
from jobs.evaluation.metrics.privacy import AreaUnderCurve, threshold
from jobs.tools import check
from jobs.training import train
from tests import build_pipeline
from tests.build_models import published_pipeline, tiny_adapter, tiny_llama, tiny_tokenizer, write_split

SCORES = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 5)), min_size=2, max_size=12).filter(
    lambda rows: len({member for _, member, _ in rows}) == 2)  # score, whether a member, cluster
RECORDS = [{"prompt": f"Who lives in room {n}?", "completion": f"Guest {n * n} does, for {n} nights."}
           for n in range(1, 151)]


def area(scores: Sequence[float], member: Sequence[bool]) -> AreaUnderCurve:
    return AreaUnderCurve.of(scores, [int(each) for each in member], Clusters.of(range(len(scores))))


def value(statistic: Any, clusters: int) -> float:
    return float(statistic(np.ones((1, clusters)))[0][0])


# --- the numbers -----------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(SCORES, st.data())
def test_the_area_is_the_share_of_pairs_in_which_the_member_has_the_higher_score(
        rows: list[tuple[int, bool, int]], data: st.DataObject) -> None:
    """Rows count as often as their cluster was drawn; the derivatives are those of this function."""
    clusters = Clusters.of([cluster for *_, cluster in rows])
    statistic = AreaUnderCurve.of([float(s) for s, *_ in rows], [int(m) for _, m, _ in rows], clusters)
    counts = np.array(data.draw(st.lists(st.integers(1, 3), min_size=clusters.count, max_size=clusters.count)), float)

    def slow(counts: Any) -> float:
        weights = counts[clusters.of_row]
        pairs = [(weights[i] * weights[j], (a[0] > b[0]) + (a[0] == b[0]) / 2)
                 for (i, a), (j, b) in itertools.product(enumerate(rows), repeat=2) if a[1] and not b[1]]
        return float(sum(weight * won for weight, won in pairs) / sum(weight for weight, _ in pairs))

    values, slopes = statistic(np.array([counts, counts * 2]))
    assert values == pytest.approx([slow(counts)] * 2)
    for n in range(clusters.count):
        step = np.eye(clusters.count)[n] * 1e-6
        assert slopes[0, n] == pytest.approx((slow(counts + step) - slow(counts - step)) / 2e-6, abs=1e-6)


def test_the_standard_error_of_the_area_is_that_of_delong() -> None:
    random = np.random.default_rng(1)
    members, others = random.normal(1, 1, 60), random.normal(0, 2, 90)
    placed = [(members[:, None] > others).mean(axis=axis) for axis in (1, 0)]
    expected = placed[0].var() / 60 + placed[1].var() / 90
    _, slopes = area([*members, *others], [True] * 60 + [False] * 90)(np.ones((1, 150)))
    assert float((slopes**2).sum()) == pytest.approx(expected)


@pytest.mark.parametrize(("scores", "member", "expected"), [
    ([1.0] * 40, [True, False] * 20, 0.5), ([2.0, 1.0] * 20, [True, False] * 20, 1.0),
    ([1.0, math.nan] * 20, [True, False] * 20, math.nan), ([1.0, math.inf] * 20, [True, False] * 20, math.nan)])
def test_equal_losses_are_chance_and_what_is_not_finite_is_no_number(
        scores: list[float], member: list[bool], expected: float) -> None:
    statistic = area(scores, member)
    assert value(statistic, 40) == pytest.approx(expected, nan_ok=True)
    found = interval(statistic, 40, 0.95, low=0, high=1)
    assert found.value == pytest.approx(expected, nan_ok=True)
    assert math.isnan(expected) or found.low <= expected <= found.high


def test_exposure_is_the_rank_of_the_secret_in_bits() -> None:
    others = [float(n) for n in range(1, ALTERNATIVES + 1)]
    assert privacy.exposure(0.5, others) == 6.0, "the likeliest of 64"
    assert privacy.exposure(1.5, others) == 5.0, "the second"
    assert privacy.exposure(99.0, others) == 0.0, "the last"
    assert privacy.exposure(1.0, [1.0] * 63) == pytest.approx(6 - math.log2(32.5)), "all the same: the middle"
    assert math.isnan(privacy.exposure(math.nan, others)) and math.isnan(privacy.exposure(1.0, [math.nan, *others]))
    of_chance = np.mean([privacy.exposure(n + 0.5, others) for n in range(64)])
    assert of_chance == pytest.approx(1.4, abs=0.03), "as the registry says"


def test_at_most_one_in_a_hundred_others_exceeds_the_threshold_and_fewer_have_none() -> None:
    random = np.random.default_rng(2)
    for count in (100, 150, 199, 200, 1000):
        scores = random.normal(size=count).tolist()
        found = threshold(scores)
        assert found is not None and sum(score > found for score in scores) == count // 100
    assert threshold([1.0] * 99) is None
    assert threshold([1.0] * 100) == 1.0


# --- the interval of a share -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "rows"), [(0, 100), (1, 100), (2, 40), (20, 40), (99, 100), (100, 100)])
def test_of_independent_rows_the_share_is_bounded_as_by_clopper_and_pearson(hits: int, rows: int) -> None:
    found = interval(Proportion.mean([1.0] * hits + [0.0] * (rows - hits), Clusters.of(range(rows))), rows, 0.95)
    high = scipy.stats.beta.ppf(0.95, hits + 1, rows - hits) if hits < rows else 1.0
    low = scipy.stats.beta.ppf(0.05, hits, rows - hits + 1) if hits else 0.0
    assert (found.value, found.low, found.high) == pytest.approx((hits / rows, low, high), abs=1e-6)


def test_rows_of_one_cluster_are_one_piece_of_evidence() -> None:
    """Thirty clusters of ten rows that all say the same are no surer than thirty rows."""
    clusters = Clusters.of([n // 10 for n in range(300)])
    for hits in (0, 3, 30):
        many = interval(Proportion.mean([float(n < hits * 10) for n in range(300)], clusters), 30, 0.95)
        few = interval(Proportion.mean([float(n < hits) for n in range(30)], Clusters.of(range(30))), 30, 0.95)
        assert few.low - 0.02 < many.low <= few.low and few.high <= many.high < few.high + 0.02


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("size", [1, 4])
def test_the_upper_bound_of_a_share_holds_as_often_as_it_says(share: float, size: int) -> None:
    """An adapter that is at the limit passes at most 5 times in 100, also with clustered records."""
    random = np.random.default_rng(3)
    clusters = Clusters.of([n // size for n in range(60 * size)])
    below = 0
    for _ in range(1000):
        own = random.beta(share * 2, (1 - share) * 2, 60) if size > 1 else np.full(60, share)
        rows = (random.random(60 * size) < np.repeat(own, size)).astype(float)
        below += Proportion.mean(rows.tolist(), clusters).interval(0.95).high < share
    assert below / 1000 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_the_interval_of_the_area_holds_as_often_as_it_says(shift: float) -> None:
    """An upper bound below the true value, or a lower one above, is a mistake."""
    random = np.random.default_rng(4)
    truth, wrong = float(scipy.stats.norm.cdf(shift / math.sqrt(2))), np.zeros(2)
    for _ in range(300):
        scores = [*random.normal(shift, 1, 30), *random.normal(0, 1, 50)]
        found = interval(area(scores, [True] * 30 + [False] * 50), 80, 0.95, low=0, high=1, resamples=500)
        wrong += found.high < truth, found.low > truth
    assert (wrong / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)).all(), wrong


@pytest.mark.parametrize("told_apart", [200, 199])
def test_an_area_near_one_is_surely_high(told_apart: int) -> None:
    """In most draws nothing is confused then, which says nothing of how sure the value is."""
    scores = [2.0] * told_apart + [0.5] * (200 - told_apart) + [n / 400 for n in range(400)]
    found = interval(area(scores, [True] * 200 + [False] * 400), 600, 0.95, low=0, high=1, resamples=1000)
    assert 0.95 < found.low < found.value <= found.high <= 1


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_reading_has_the_loss_and_what_greedy_decoding_would_continue(tmp_path: Path) -> None:
    """One pass says how far the model's own continuation is the record's."""
    import torch

    tokenizer = tiny_tokenizer(tmp_path)
    tiny_llama(tmp_path)
    model = models.load_model(tmp_path)
    random = np.random.default_rng(5)
    prompts = [random.integers(5, 300, size).tolist() for size in (3, 9, 14, 5)]
    sequences = []
    for agreeing, prompt in enumerate(prompts):
        written = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None,
                                 pad_token_id=1)[0].tolist()
        written[len(prompt) + 2 * agreeing] = 7 if written[len(prompt) + 2 * agreeing] != 7 else 8
        sequences.append(Encoded(written, [(len(prompt), len(written))]))
    starts = list(map(len, prompts))
    found = privacy.readings(model, sequences, starts, Progress("read", 4))
    assert [each.continued for each in found] == [0, 2, 4, 6]
    expected = scoring.negative_log_likelihoods(model, sequences, Progress("read", 4))
    assert [each.nats for each in found] == pytest.approx([each.nats for each in expected], rel=1e-5)
    assert tokenizer.eos_token_id == 0


def test_the_sample_is_the_same_everywhere_and_holds_whole_records_but_no_canary(tmp_path: Path) -> None:
    rows = [(line, Encoded.of([line % 9 + 5], [turn])) for line in range(1, 301) for turn in range(1 + line % 2)]
    write_split(tmp_path / "train.arrow", [*rows, *((-n, Encoded.of([1], [2])) for n in range(1, 51))])
    split = encoded.Split(tmp_path / "train.arrow")
    found = privacy.sample(split, 100, "seed")
    assert len(found) == 100 and min(found) > 0 and list(found) == sorted(found)
    assert all(sequences == [sequence for n, sequence in rows if n == line] for line, sequences in found.items())
    assert found.keys() == privacy.sample(split, 100, "seed").keys() != privacy.sample(split, 100, "other").keys()
    assert list(found)[:5] == [3, 6, 9, 10, 11], "on every machine"
    assert privacy.sample(split, 1000, "seed").keys() == set(range(1, 301))


def test_of_a_plain_text_the_first_part_is_the_prompt() -> None:
    assert privacy.continued_from(Encoded.of([1, 2, 3], [4, 5])) == 3
    assert privacy.continued_from(Encoded.of([], list(range(20)))) == 10
    assert privacy.continued_from(Encoded.of([], list(range(500)))) == 50


# --- the evaluation --------------------------------------------------------------------------------------------------

GATE = {"privacy.exposure": {"max": 4}, "privacy.membership_auc": {"max": 0.6}, "privacy.canary_auc": {"max": 0.8},
        "privacy.canary_tpr": {"max": 0.3}, "privacy.membership_tpr": {"max": 0.1}, "privacy.verbatim": {"max": 0.1}}
PRIVATE = {"canaries": 20, "verbatim_tokens": 10}


def evaluation_of(loaded: Any, volumes: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((plan(loaded.pipeline).evaluation.path(volumes) / "evaluation.json").read_text())
    return found


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: Any) -> tuple[Any, Path]:
    """An adapter that was trained on nothing, evaluated: all rules should hold."""
    loaded, volumes = published_pipeline(tmp_path_factory.mktemp("private"), records=RECORDS, gate=GATE,
                                         privacy=PRIVATE)
    evaluate.run(loaded, volumes, 0)
    return loaded, volumes


def test_an_adapter_that_was_not_trained_on_the_data_passes_every_rule(evaluated: tuple[Any, Path]) -> None:
    evaluation = evaluation_of(*evaluated)
    assert {check["metric"]: check["outcome"] for check in evaluation["gate"]} == dict.fromkeys(GATE, "passed")
    scores, bounds = evaluation["scores"], evaluation["intervals"]
    for role in ("base", "fine_tuned"):
        for score in PRIVACY.scores:
            low, high = bounds[role][score.key]
            assert score.low <= low <= scores[role][score.key] <= high <= score.high
        assert scores[role]["privacy.exposure"] == pytest.approx(1.4, abs=1)
    assert all(scores["reference"][score.key] is None for score in PRIVACY.scores), "it has no part in training"
    assert evaluation["privacy"]["counts"] == {"canary": 20, "twin": 200, "train": 150, "holdout": 150}


def test_values_are_kept_by_position_and_no_text_of_a_record_is_written(evaluated: tuple[Any, Path]) -> None:
    loaded, volumes = evaluated
    wanted = plan(loaded.pipeline)
    rows = scoring.read_jsonl(wanted.adapter_scores.path(volumes) / "privacy.jsonl")
    assert [row["line"] for row in rows] == list(range(1, 521))
    assert [row["position"] for row in rows if row["kind"] == "train"] == list(range(1, 151))
    kinds = {"canary", "twin", "train", "holdout"}
    assert {value for row in rows for value in row.values() if isinstance(value, str)} == kinds
    assert not (wanted.reference_scores.path(volumes) / "privacy.jsonl").exists()
    privately = json.dumps(evaluation_of(loaded, volumes)["privacy"])
    assert "room" not in privately and "Guest" not in privately and '"position"' in privately


def test_an_adapter_measured_after_a_kill_has_the_same_values(evaluated: tuple[Any, Path], tmp_path: Path) -> None:
    """The base model's values, to which its own are compared, come from the artifact then."""
    loaded, volumes = evaluated
    copy = Path(shutil.copytree(volumes, tmp_path / "volumes"))
    file = plan(loaded.pipeline).adapter_scores.path(copy) / "privacy.jsonl"
    before = scoring.read_jsonl(file)
    shutil.rmtree(file.parent)
    evaluate.measure(loaded.pipeline, plan(loaded.pipeline), copy, 0)
    for row, again in zip(before, scoring.read_jsonl(file), strict=True):
        assert again.keys() == row.keys()
        assert all(again[key] == (pytest.approx(row[key], rel=1e-5) if isinstance(row[key], float) else row[key])
                   for key in row)


def test_a_change_of_clusters_measures_nothing_again(
        evaluated: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, volumes = evaluated
    monkeypatch.setattr(scoring, "measure", None)
    other = loaded.pipeline.model_copy(update={
        "evaluation": loaded.pipeline.evaluation.model_copy(update={"clusters": "record"})})
    decided = evaluate.decide(other, plan(other), volumes, 0)
    assert decided and decided[0].path != plan(loaded.pipeline).evaluation.path(volumes)


def test_without_privacy_nothing_of_it_is_measured(tmp_path: Path) -> None:
    loaded, volumes = published_pipeline(tmp_path)
    evaluate.run(loaded, volumes, 0)
    evaluation, wanted = evaluation_of(loaded, volumes), plan(loaded.pipeline)
    assert "privacy" not in evaluation and not any(key.startswith("privacy") for key in evaluation["scores"]["base"])
    assert not (wanted.adapter_scores.path(volumes) / "privacy.jsonl").exists()


def test_without_canaries_the_records_are_measured(tmp_path: Path) -> None:
    loaded, volumes = published_pipeline(tmp_path, records=RECORDS, gate={"privacy.membership_auc": {"max": 0.6}},
                                         privacy={"canaries": 0})
    evaluate.run(loaded, volumes, 0)
    evaluation = evaluation_of(loaded, volumes)
    assert evaluation["passed"] and evaluation["scores"]["fine_tuned"]["privacy.exposure"] is None
    assert evaluation["privacy"]["counts"] == {"canary": 0, "twin": 0, "train": 150, "holdout": 150}


def test_an_adapter_of_nan_weights_fails_every_rule(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    loaded, volumes = published_pipeline(tmp_path, records=RECORDS, gate=GATE, privacy=PRIVATE, without=("adapter",))
    base = plan(loaded.pipeline).base_model.path(volumes)

    def damaged(draft: Path) -> None:
        tiny_adapter(draft, base)
        file = draft / "adapter_model.safetensors"
        save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)

    artifacts.publish(plan(loaded.pipeline).adapter, volumes, damaged, keep=5)
    evaluate.run(loaded, volumes, 0)
    outcomes = {check["metric"]: check["outcome"] for check in evaluation_of(loaded, volumes)["gate"]}
    assert outcomes == dict.fromkeys(GATE, "failed")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("evaluation", "message"), [
    ({"gate": {"privacy.membership_auc": {"max": 0.6}}},
     r"evaluation.gate.privacy.membership_auc: is not measured: add `privacy: \{\}` to evaluation"),
    ({"gate": {"privacy.exposure": {"max": 3}}, "privacy": {"canaries": 0}},
     "evaluation.gate.privacy.exposure: is measured with canaries, and evaluation.privacy.canaries is 0"),
    ({"gate": {"privacy.exposure": {"max_ratio": 1.5}}, "privacy": {}},
     "evaluation.gate.privacy.exposure.max_ratio: privacy is not compared with other models"),
    ({"gate": {"privacy.exposure": {"min": 3}}, "privacy": {}},
     "evaluation.gate.privacy.exposure.min: min would let an adapter pass for being worse"),
    ({"gate": {"privacy.membership": {"max": 0.6}}, "privacy": {}}, "did you mean `privacy.membership_"),
    ({"privacy": {"canaries": 5}}, "evaluation.privacy.canaries: 5: 5 canaries cannot prove anything: at least 20"),
    ({"privacy": {"canaris": 50}}, "evaluation.privacy.canaris: unknown key; did you mean `canaries`"),
    ({"privacy": {"records": 10}}, "evaluation.privacy.records: 10: input should be greater than or equal to 100"),
    ({"privacy": True}, "evaluation.privacy: True")])
def test_rules_and_settings_that_cannot_be_meant_are_refused(
        tmp_path: Path, evaluation: dict[str, Any], message: str) -> None:
    changes = {f"evaluation__{key}": value for key, value in evaluation.items()}
    with pytest.raises(UserError, match=message) as raised:
        pipeline.load(build_pipeline.write(tmp_path, **changes))
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(("settings", "message"), [
    ({"records": RECORDS[:60], "gate": {"privacy.membership_tpr": {"max": 0.1}}, "privacy": PRIVATE},
     "privacy.membership_tpr: 60 held-out records are too few, at least 100 are needed: .*; better are a thousand"),
    ({"records": RECORDS[:19], "gate": {"privacy.membership_auc": {"max": 0.6}}, "privacy": {"canaries": 0}},
     "privacy.membership_auc: 19 held-out records are too few, at least 20"),
    ({"records": RECORDS, "gate": {"privacy.verbatim": {"max": 0.1}}, "privacy": {"verbatim_tokens": 90}},
     "privacy.verbatim: the 0 train records with answers of at least 90 tokens are in 0 clusters, at least 20"),
    ({"records": [{**record, "completion": "Yes."} for record in RECORDS],
      "gate": {"privacy.membership_auc": {"max": 0.6}}, "privacy": PRIVATE},
     "privacy.membership_auc: the 150 train records are in 1 clusters, .* set evaluation.clusters: record")])
def test_records_that_cannot_decide_a_rule_are_found_before_the_adapter_is_trained(
        tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    loaded, volumes = published_pipeline(tmp_path, **settings, without=("base_model", "reference_model", "adapter"))
    with pytest.raises(UserError, match=message):
        evaluate.run(loaded, volumes, 0)


def test_check_finds_canaries_that_outnumber_the_records() -> None:
    """Before anything runs, where the data lies in git."""
    loaded = type("Loaded", (), {"path": Path("pipeline.yaml"), "pipeline": build_pipeline.build(
        evaluation__privacy={"repetitions": 4})})()
    check.check_privacy(loaded, {"records": {"train": 400, "holdout": 50}})
    with pytest.raises(UserError, match=r"^pipeline.yaml: evaluation.privacy: 100 canaries, 4 of each, are more than"):
        check.check_privacy(loaded, {"records": {"train": 399, "holdout": 50}})


# --- training --------------------------------------------------------------------------------------------------------


def learner(folder: Path) -> None:
    """A Llama that has learned nothing yet, and can."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=256, eos_token_id=0, bos_token_id=None, pad_token_id=1,
        initializer_range=0.1)).save_pretrained(folder)


@pytest.mark.slow
def test_a_hundred_epochs_fail_and_one_passes(tmp_path: Path) -> None:
    """Half of the records are learned: by heart after a hundred epochs, hardly after one."""
    random = np.random.default_rng(6)
    words = ["".join(random.choice(list("abcdefghij"), 8)) for _ in range(600)]
    records = [{"prompt": f"Room {number}?", "completion": word}
               for number, word in zip(random.permutation(600).tolist(), words, strict=True)]
    gate = {"privacy.membership_auc": {"max": 0.6}, "privacy.exposure": {"max": 4}}
    outcomes, scores = {}, {}
    for epochs in (1, 100):
        settings: dict[str, Any] = {"gate": gate, "privacy": {"canaries": 20, "verbatim_tokens": 8},
                                    "base_model": learner, "epochs": epochs, "learning_rate": 1e-2,
                                    "tokens_per_batch": 4096, "lora": {"dropout": 0.0}}
        loaded, volumes = published_pipeline(tmp_path, train_records=records[:200], records=records[200:],
                                             without=("adapter",), **settings)
        train.run(loaded, volumes, 0)
        card = (plan(loaded.pipeline).adapter.path(volumes) / "README.md").read_text()
        assert "| records | 200 train, 400 held out, 0 too long |" in card and "| canaries | 20, trained on" in card
        evaluate.run(loaded, volumes, 0)
        evaluation = evaluation_of(loaded, volumes)
        outcomes[epochs] = {check["metric"]: check["outcome"] for check in evaluation["gate"]}
        scores[epochs] = evaluation["scores"]["fine_tuned"]
        rows = scoring.read_jsonl(plan(loaded.pipeline).adapter_scores.path(volumes) / "privacy.jsonl")
        # Halves of what was learned alike cannot be told apart.
        learned = [row["record_score"] for row in rows if row["kind"] == "train"]
        half = np.isin(np.arange(200), np.random.default_rng(7).permutation(200)[:100])
        found = interval(area(learned, half.tolist()), 200, 0.95, low=0, high=1)
        assert found.low < 0.5 < found.high
    for epochs, found in scores.items():
        print(epochs, {key: round(found[key], 3) for key in found if key.startswith("privacy")})
    assert outcomes == {1: dict.fromkeys(gate, "passed"), 100: dict.fromkeys(gate, "failed")}
    assert scores[100]["privacy.exposure"] > 5 and scores[100]["privacy.verbatim"] > scores[1]["privacy.verbatim"] == 0
