"""The metrics give the numbers that their definitions give, whatever the language, and need no network and no home."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.core.errors import UserError
from jobs.core.metrics import METRICS, SCORES
from jobs.evaluation import metrics
from jobs.evaluation.metrics import acceptability, perplexity, reusable, rouge
from jobs.evaluation.metrics.acceptability import halves, matthews, matthews_slopes, thresholds
from jobs.evaluation.metrics.reusable import Acceptability, Perplexity, Rouge
from jobs.evaluation.metrics.rouge import Words

COUNT = st.integers(0, 50)


def value(metric: Any, key: str, measurements: metrics.Measurements) -> float:
    return reusable.value_of(metric, key, [row for row in metric.rows(measurements) if row is not None])


def sentences(count: int = 8, *, long: metrics.Likelihood, short: metrics.Likelihood) -> metrics.Measurements:
    """Measured sentences, every other one acceptable: those have the likelihood `long`, the others `short`."""
    judged = [(f"sentence {i}", i % 2 == 0) for i in range(count)]
    return metrics.Measurements([], [], [], judged, [long if good else short for _, good in judged])


def test_every_metric_keeps_the_columns_and_computes_the_scores_that_its_entry_names() -> None:
    record = {"prompt": "a", "completion": "b"}
    measurements = metrics.Measurements(
        [record], [metrics.Likelihood(1.0, 2)], ["b"], [(t, t in "ab") for t in "abcd"],
        [metrics.Likelihood(nats, 1) for nats in (1.0, 2.0, 3.0, 4.0)])
    for metric in METRICS:
        rows = metrics.implementation(metric).rows(measurements)
        for row in rows:
            assert row is not None and tuple(row) == metric.columns
        for score in metric.scores:
            found = reusable.value_of(metrics.implementation(metric), score.key, [row for row in rows if row])
            assert score.low <= found <= score.high
    assert len(SCORES) == sum(len(metric.scores) for metric in METRICS), "no key twice"


def test_a_sentences_score_is_the_mean_log_probability_of_a_token() -> None:
    """Not of the whole sentence: long sentences would be called broken."""
    long, short = metrics.Likelihood(10.0, 10), metrics.Likelihood(6.0, 2)  # -1 and -3 a token
    measured = sentences(long=long, short=short)
    assert [row and row["score"] for row in acceptability.rows(measured)] == [-1.0, -3.0] * 4
    assert value(acceptability, "acceptability_mcc", measured) == 1.0
    with pytest.raises(UserError, match=r"evaluation\.acceptability: needs at least two .* of two tokens or more"):
        acceptability.rows(sentences(3, long=long, short=short))


def test_the_registry_is_read_without_the_libraries_that_compute() -> None:
    """`jobs local` and an evaluation that is done print the table at once."""
    code = "import sys; from jobs.evaluation import report; print(sorted(sys.modules.keys() & {*sys.argv[1:]}))"
    done = subprocess.run([sys.executable, "-c", code, "torch", "evaluate", "datasets", "numpy", "nltk"],
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_perplexity_weighs_tokens_not_records() -> None:
    """Three tokens of 1 bit and one of 5 bits: 2 to the power of (3 + 5) / 4, and 8 bits over 16 bytes."""
    got = metrics.compute(Perplexity, nll=[3 * math.log(2), 5 * math.log(2)], special=[0.0, 0.0], tokens=[3, 1],
                          bytes=[10, 6])
    assert got["perplexity"] == pytest.approx(4.0, rel=1e-12)
    assert got["bits_per_byte"] == pytest.approx(0.5, rel=1e-12)


def test_a_hopeless_model_has_infinite_perplexity_and_raises_nothing() -> None:
    assert metrics.compute(Perplexity, nll=[5000.0], special=[0.0], tokens=[1], bytes=[1])["perplexity"] == math.inf


def test_special_tokens_are_no_text_and_their_bits_are_not_divided_by_its_bytes() -> None:
    got = metrics.compute(Perplexity, nll=[8 * math.log(2)], special=[4 * math.log(2)], tokens=[4], bytes=[8])
    assert got["bits_per_byte"] == pytest.approx(0.5, rel=1e-12)
    assert got["perplexity"] == pytest.approx(4.0, rel=1e-12), "the model is asked for them too"


def test_bytes_are_those_of_every_answer_of_a_conversation() -> None:
    record = {"messages": [{"role": role, "content": text} for role, text in (
        ("user", "?"), ("assistant", "é"), ("user", "?"), ("assistant", "abcdef"))]}
    measured = metrics.Measurements([record], [metrics.Likelihood(8 * math.log(2), 8)], [None], [], [])
    assert value(perplexity, "bits_per_byte", measured) == pytest.approx(1.0, rel=1e-12)


def test_rouge_counts_shared_words_pairs_and_sequences() -> None:
    """Counted by hand: 5 of 6 words, 3 of 5 pairs, and "the cat … on the mat" in order."""
    got = metrics.compute(Rouge, predictions=["The cat is on the mat."], references=["the cat sat on the mat"])
    assert got == pytest.approx({"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6, "rougeLsum": 5 / 6})


def test_rouge_is_the_mean_over_pairs_and_stems_words() -> None:
    got = metrics.compute(Rouge, predictions=["booking rooms", "nothing"], references=["booked room", "something"])
    assert got["rouge1"] == pytest.approx(0.5)


def test_rouge_lsum_takes_lines_as_sentences() -> None:
    """Swapped lines: every line is found again, but the longest sequence over the whole text is one line."""
    got = metrics.compute(Rouge, predictions=["one two\nthree four"], references=["three four\none two"])
    assert (got["rougeL"], got["rougeLsum"]) == (0.5, 1.0)


@pytest.mark.parametrize(("answer", "reference", "least"), [
    ("Málaga", "málaga", 1.0), ("Завтрак подают утром", "Завтрак подают вечером", 0.6),
    ("早餐在七点", "早餐在八点", 0.7)])
def test_rouge_sees_words_in_every_script(answer: str, reference: str, least: float) -> None:
    """rouge_score's own tokenizer would give 0 to any Russian or Chinese answer, right or wrong."""
    assert metrics.compute(Rouge, predictions=[answer], references=[reference])["rouge1"] >= least


def test_only_english_words_are_stemmed() -> None:
    """Porter's rules are for English; on other words they would cut off what carries the meaning."""
    assert Words().tokenize("Rooms habitaciónes") == ["room", "habitaciónes"]


def test_words_of_three_letters_are_not_stemmed() -> None:
    """As in rouge_score: Porter's rules would make "ga" of "gas"."""
    assert Words().tokenize("The gas bees") == ["the", "gas", "bee"]


def test_rouge_compares_the_answers_with_the_references_of_their_questions() -> None:
    records = [{"prompt": "a", "completion": "one two"}, {"text": "one two"}, {"prompt": "b", "completion": "three"}]
    measured = metrics.Measurements(records, [], ["one two", None, "one two"], [], [])
    assert rouge.rows(measured)[1] is None, "a text asks nothing"
    assert {key: value(rouge, key, measured) for key in rouge.TYPES} == {
        "rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5, "rougeLsum": 0.5}


@given(st.text(st.characters(max_codepoint=127)))
def test_rouge_reads_ascii_exactly_as_rouge_score_does(text: str) -> None:
    from rouge_score.tokenizers import DefaultTokenizer

    assert Words().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


def table(*counts: float) -> list[Any]:
    return [np.array([count], dtype=np.float64) for count in counts]


def threshold(scores: Any, acceptable: Any) -> float:
    """Of sentences that each count once."""
    return float(thresholds(scores, acceptable, np.ones((1, len(scores))))[0])


@given(COUNT, COUNT, COUNT, COUNT)
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_matthews_correlation_agrees_with_scikit_learn(tp: int, fp: int, fn: int, tn: int) -> None:
    from sklearn.metrics import matthews_corrcoef

    if tp + fp + fn + tn == 0:
        return
    truth = [1] * tp + [0] * fp + [1] * fn + [0] * tn
    judged = [1] * tp + [1] * fp + [0] * fn + [0] * tn
    assert float(matthews(*table(tp, fp, fn, tn))[0]) == pytest.approx(matthews_corrcoef(truth, judged), abs=1e-12)


@pytest.mark.parametrize("count", [1, 100_000])  # whose product is more than 64 bits hold
def test_matthews_correlation_of_a_perfect_judge_is_one_whatever_the_size_of_the_set(count: int) -> None:
    assert float(matthews(*table(count, 0, 0, count))[0]) == 1.0


def test_the_slopes_of_matthews_correlation_are_its_derivatives() -> None:
    at = [30.0, 5.0, 7.0, 21.0]
    for place, slope in enumerate(matthews_slopes(*table(*at))):
        more, less = ([count + sign * 1e-4 * (n == place) for n, count in enumerate(at)] for sign in (1, -1))
        assert slope[0] == pytest.approx((matthews(*table(*more))[0] - matthews(*table(*less))[0]) / 2e-4, rel=1e-5)


@given(st.permutations(range(30)), st.integers(0, 2**30 - 1))
def test_the_threshold_accepts_as_many_sentences_as_are_acceptable(scores: list[int], labels: int) -> None:
    acceptable = np.array([bool(labels >> n & 1) for n in range(30)])
    chosen = threshold(np.array(scores, dtype=np.float64), acceptable)
    assert (np.array(scores) >= chosen).sum() == acceptable.sum()


def test_a_sentence_counts_as_often_as_it_was_drawn() -> None:
    """Of four sentences with these scores, one draw has all, one the first twice, one the last three times."""
    found = thresholds(np.array([0.0, 1, 2, 3]), np.array([False, False, True, True]),
                       np.array([[1.0, 1, 1, 1], [2, 0, 1, 1], [0, 1, 0, 3]]))
    assert found.tolist() == [1.5, 1.0, 2.0]


def test_the_threshold_is_midway_between_two_scores() -> None:
    assert threshold(np.array([-5.0, -2.0, -6.0, -1.0]), np.array([False, True, False, True])) == -3.5


def test_each_half_is_judged_by_the_threshold_of_the_other() -> None:
    """One half has higher scores than the other. Each is told apart by a threshold of its own, none by the other's."""
    texts, labels = [f"sentence {i}" for i in range(40)], [i % 2 == 0 for i in range(40)]
    scores = [good + 10.0 * second for good, second in zip(labels, halves(texts, labels), strict=True)]
    got = metrics.compute(Acceptability, texts=texts, predictions=scores, references=labels)
    assert got == {"acceptability_mcc": 0.0, "acceptability_accuracy": 0.5}


def test_acceptability_of_a_perfect_judge_is_one() -> None:
    texts, labels = [f"sentence {i}" for i in range(40)], [i < 30 for i in range(40)]
    got = metrics.compute(Acceptability, texts=texts, predictions=[-2.0 if good else -5.0 for good in labels],
                          references=labels)
    assert got == {"acceptability_mcc": 1.0, "acceptability_accuracy": 1.0}


def test_a_sentence_exactly_at_the_threshold_is_called_acceptable() -> None:
    """A model that cannot tell them apart accepts all, and is right about the acceptable ones."""
    texts, labels = [f"sentence {i}" for i in range(40)], [i < 30 for i in range(40)]
    got = metrics.compute(Acceptability, texts=texts, predictions=[-2.0] * 40, references=labels)
    assert got == {"acceptability_mcc": 0.0, "acceptability_accuracy": 0.75}


@given(st.permutations(range(23)))
def test_the_halves_are_balanced_and_do_not_depend_on_the_order_of_the_set(order: list[int]) -> None:
    texts, labels = [f"sentence {i}" for i in range(23)], [i < 9 for i in range(23)]
    half = halves(texts, labels)
    assert (int(half[:9].sum()), int(half[9:].sum())) == (5, 7)
    moved = halves([texts[i] for i in order], [labels[i] for i in order])
    assert [bool(half[i]) for i in order] == moved.tolist()


def test_too_few_sentences_of_a_class_is_said_not_guessed() -> None:
    with pytest.raises(ValueError, match="at least two acceptable and two unacceptable"):
        acceptability.halves(["a", "b", "c"], [True, True, False])


def test_a_score_that_is_not_a_number_judges_nothing() -> None:
    got = metrics.compute(Acceptability, texts=list("abcd"), predictions=[math.nan, 1.0, 2.0, 3.0],
                          references=[True, False, True, False])
    assert got.keys() == {"acceptability_mcc", "acceptability_accuracy"}
    assert all(math.isnan(value) for value in got.values())


@pytest.mark.slow
def test_metrics_need_no_network_and_no_writable_home() -> None:
    """In the pod the home is read-only and nothing outside can be reached."""
    code = """
import socket
def refuse(*_): raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
from jobs.evaluation import metrics
from jobs.evaluation.metrics.reusable import Rouge
print(metrics.compute(Rouge, predictions=["a b"], references=["a b"])["rougeL"])
"""
    env = {k: v for k, v in os.environ.items() if k not in {"HF_HOME", "XDG_CACHE_HOME"}} | {"HOME": "/dev/null"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "1.0"), done.stderr
