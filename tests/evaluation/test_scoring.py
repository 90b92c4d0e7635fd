"""One model's scores are what a slow, simple computation gives, for Llama-like models and for GPT-2."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.core import models
from jobs.core.errors import UserError
from jobs.core.metrics import SCORES
from jobs.core.progress import Progress
from jobs.data import encoded
from jobs.data.encoding import Encoded, encode
from jobs.evaluation import scoring
from jobs.evaluation.holdout import answered_lines
from jobs.evaluation.scoring import Material
from tests.build_models import RECORDS, SENTENCES, tiny_gpt2, tiny_llama, tiny_tokenizer, write_split

TEXTS = [{"text": "The cook reads the book."}, {"text": "The maid reads."}]


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2])
def loaded(request: Any, tmp_path_factory: Any) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("model")
    make: Callable[..., None] = request.param
    make(folder, positions=96)
    tiny_tokenizer(folder)
    return models.load_model(folder), models.load_tokenizer(folder)


def material(records: list[Any], max_length: int = 90, max_new_tokens: int = 8) -> Material:
    return Material(records, SENTENCES, max_length, max_new_tokens)


def slow_nll(model: Any, ids: list[int], first: int) -> float:
    """The definition: one sequence, one token after another, no padding."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return -sum(float(torch.log_softmax(logits[at - 1], -1)[ids[at]]) for at in range(first, len(ids)))


def test_padded_batches_give_the_likelihoods_of_one_record_at_a_time(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    sequences = [encode(tokenizer, record)[0] for record in (*RECORDS, *TEXTS)]
    got = scoring.negative_log_likelihoods(model, sequences, Progress("test", len(sequences)))
    for sequence, (nats, tokens, _) in zip(sequences, got, strict=True):
        first = max(1, len(sequence.prompt))
        assert tokens == len(sequence) - first
        assert nats == pytest.approx(slow_nll(model, list(sequence.tokens), first), rel=1e-5)


def test_likelihoods_are_computed_in_float32_whatever_the_model_computes_in(loaded: tuple[Any, Any]) -> None:
    """On a GPU models compute in bfloat16, whose 8 bits would round the likelihoods themselves."""
    import copy

    import torch

    model, tokenizer = copy.deepcopy(loaded[0]).to(torch.bfloat16), loaded[1]
    (sequence,) = encode(tokenizer, RECORDS[0])
    [(nats, *_)] = scoring.negative_log_likelihoods(model, [sequence], Progress("test", 1))
    expected = slow_nll(model, list(sequence.tokens), len(sequence.prompt))
    assert nats == pytest.approx(expected, rel=1e-5)


def test_likelihoods_equal_the_loss_that_training_minimises(loaded: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = loaded
    (sequence,) = encode(tokenizer, RECORDS[0])
    labels = torch.tensor([sequence.labels()])
    with torch.no_grad():
        loss = float(model(torch.tensor([list(sequence.tokens)]), labels=labels).loss)
    [(nats, tokens, _)] = scoring.negative_log_likelihoods(model, [sequence], Progress("test", 1))
    assert nats / tokens == pytest.approx(loss, rel=1e-5)


def test_answers_in_a_batch_are_the_greedy_answers_of_one_question_at_a_time(
        loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And settings that come with a model (sampling, repetition penalties) do not change what is measured."""
    import torch
    from transformers import GenerationConfig

    model, tokenizer = loaded
    prompts = [list(encode(tokenizer, record)[0].prompt) for record in RECORDS]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 8 and (len(ids) == len(prompt) or ids[-1] != tokenizer.eos_token_id):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[len(prompt):], skip_special_tokens=True).strip())
    monkeypatch.setattr(model, "generation_config",
                        GenerationConfig(do_sample=True, temperature=2.0, repetition_penalty=5.0, eos_token_id=0))
    assert scoring.generate(model, tokenizer, prompts, 8, 96, Progress("test", len(prompts))) == expected


def test_an_answer_stops_at_every_end_token_that_serving_stops_at(
        loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import GenerationConfig

    model, tokenizer = loaded
    prompt = list(encode(tokenizer, RECORDS[0])[0].prompt)
    with torch.no_grad():
        first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=[first]))
    assert scoring.stop_tokens(model, tokenizer) == sorted({first, tokenizer.eos_token_id})
    assert scoring.generate(model, tokenizer, [prompt], 8, 96, Progress("test", 1)) == [""]


def test_an_answer_is_text_without_the_tokens_of_the_template(loaded: tuple[Any, Any]) -> None:
    """A model may write `<|user|>` and go on; clients of vLLM get the text around it."""
    import torch

    tokenizer = loaded[1]
    written = torch.tensor([tokenizer("The cook<|user|> reads")["input_ids"]])

    class Writer:
        device, generation_config = torch.device("cpu"), None

        def generate(self, input_ids: Any, **_: Any) -> Any:
            return torch.cat([input_ids, written], 1)

    model: Any = Writer()
    assert scoring.generate(model, tokenizer, [[5, 6]], 8, 96, Progress("test", 1)) == ["The cook reads"]


def test_a_batch_takes_no_more_memory_than_it_may(monkeypatch: pytest.MonkeyPatch, loaded: tuple[Any, Any]) -> None:
    """Logits are what takes memory while reading; keys and values, of the answer too, while writing."""
    import torch

    model, shapes = loaded[0], []
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 60 * vocabulary * 4)

    def forward(input_ids: Any, **_: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, vocabulary))

    monkeypatch.setattr(model, "forward", forward)
    scoring.negative_log_likelihoods(model, [Encoded.of([5] * 10, [6] * 10)] * 6, Progress("test", 6))
    assert shapes == [(3, 20), (3, 20)]

    class Writer:
        device, generation_config = torch.device("cpu"), None

        def generate(self, input_ids: Any, **_: Any) -> Any:
            shapes.append(tuple(input_ids.shape))
            return input_ids

    shapes.clear()
    monkeypatch.setattr(scoring, "TOKENS_PER_GENERATION", {"cpu": 60})
    writer: Any = Writer()
    scoring.generate(writer, loaded[1], [[5] * 12] * 6, 8, 96, Progress("test", 6))
    assert shapes == [(3, 12), (3, 12)]


def test_answers_never_run_past_the_positions_that_the_model_has(loaded: tuple[Any, Any]) -> None:
    """A GPT-2 with 96 positions and a long prompt must not end in an index error."""
    model, tokenizer = loaded
    answers = scoring.generate(model, tokenizer, [[5] * 94, [6, 7]], 50, 96, Progress("test", 2))
    assert len(answers) == 2 and len(tokenizer(answers[0])["input_ids"]) <= 8


def test_a_question_that_leaves_little_room_cuts_no_other_answer_short(loaded: tuple[Any, Any]) -> None:
    def answers(prompts: list[list[int]]) -> list[str]:
        return scoring.generate(*loaded, prompts, 50, 96, Progress("test", len(prompts)))

    prompts = [[5] * 94, [6, 7], [8] * 60, [9] * 94]
    assert answers(prompts) == [answer for prompt in prompts for answer in answers([prompt])]


def test_the_scores_of_a_model_are_complete_and_follow_their_definitions(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    found = scoring.measure(model, tokenizer, material(RECORDS), "tiny")
    scores, generations = found.summary, found.generations
    encoded = [encode(tokenizer, record)[0] for record in RECORDS]
    nats = sum(slow_nll(model, list(e.tokens), len(e.prompt)) for e in encoded)
    tokens = sum(len(e.completion) for e in encoded)
    spelled = sum(len(line["reference"].encode()) for line in generations)
    text = sum(slow_nll(model, list(e.tokens[:-1]), len(e.prompt)) for e in encoded)  # without the end token
    assert scores["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(text / math.log(2) / spelled, rel=1e-5)
    assert (scores["model"], scores["records"], scores["completion_tokens"]) == ("tiny", 4, tokens)
    assert (scores["questions"], scores["sentences"]) == (4, len(SENTENCES))
    assert scores["rougeL"] == pytest.approx(sum(line["rougeL"] for line in generations) / 4)
    assert [line["question"] for line in generations][1:] == [
        "When is breakfast?", "May I bring my dog?", "system: Be brief.\nuser: How many rooms are there?"]
    answers = scoring.generate(model, tokenizer, [list(e.prompt) for e in encoded], 8, 96, Progress("test", 4))
    assert [line["answer"] for line in generations] == answers
    assert (scores["vocabulary"], scores["records_too_long"]) == (scoring.vocabulary(tokenizer), 0)
    assert SCORES.keys() <= scores.keys()


def test_every_answer_of_a_conversation_is_measured_and_the_last_one_is_asked_for(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    messages = [{"role": role, "content": text} for role, text in (
        ("user", "Who?"), ("assistant", "The cook."), ("user", "When?"), ("assistant", "Today."))]
    (encoded,) = encode(tokenizer, {"messages": messages})
    found = scoring.measure(model, tokenizer, material([{"messages": messages}]), "tiny")
    scores, (asked,) = found.summary, found.generations
    text = 0.0
    for first, last in encoded.learned:
        text += slow_nll(model, list(encoded.tokens[: last - 1]), first)
    assert scores["completion_tokens"] == sum(last - first for first, last in encoded.learned)
    assert scores["bits_per_byte"] == pytest.approx(text / math.log(2) / len("The cook.Today."), rel=1e-5)
    assert (asked["question"], asked["reference"]) == ("user: Who?\nassistant: The cook.\nuser: When?", "Today.")


def test_special_tokens_are_no_answer(loaded: tuple[Any, Any]) -> None:
    """A reply of nothing else is empty, and a record whose answer is nothing else is not measured."""
    import torch

    model, tokenizer = loaded

    class Writer:
        device, generation_config = torch.device("cpu"), None

        def generate(self, input_ids: Any, **_: Any) -> Any:
            return torch.cat([input_ids, torch.tensor([[2, 1, 3, 0]])], 1)

    writer: Any = Writer()
    assert scoring.generate(writer, tokenizer, [[5] * 4], 8, 96, Progress("test", 1)) == [""]
    odd = {"prompt": "Who?", "completion": "<|user|><|assistant|>"}
    scores = scoring.measure(model, tokenizer, material([*RECORDS, odd]), "tiny").summary
    assert (scores["records"], scores["questions"]) == (4, 4)
    for alone in (odd, {"text": "<|user|>"}):
        with pytest.raises(UserError, match="none of the 1 held-out records"):
            scoring.measure(model, tokenizer, material([alone]), "tiny")


def test_special_tokens_of_infinite_surprise_leave_the_text_its_own(loaded: tuple[Any, Any]) -> None:
    import copy

    import torch

    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    (sequence,) = encode(tokenizer, RECORDS[0])
    (found,) = scoring.negative_log_likelihoods(model, [sequence], Progress("test", 1), {0})
    assert math.isnan(found.nats) and math.isnan(found.special)
    (found,) = scoring.negative_log_likelihoods(model, [sequence], Progress("test", 1), {99999})
    assert found.special == 0.0


def test_a_record_that_the_template_rejects_is_named(loaded: tuple[Any, Any]) -> None:
    """The reference model has a template of its own."""
    odd = {"prompt": "Who?", "completion": "The <|end|> maid."}
    with pytest.raises(UserError, match=r"^tiny: holdout\.jsonl:5 of the dataset: messages\[1\] \(role assistant\): "):
        scoring.measure(*loaded, material([*RECORDS, odd]), "tiny")


def test_the_log_says_what_is_measured_and_how_far_it_is(
        loaded: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jobs")
    scoring.measure(*loaded, material(RECORDS), "tiny")
    assert [re.sub(r"[\d.]+ s.*", "", message) for message in caplog.messages] == [
        "tiny: held-out records read: 4 in ", "tiny: held-out questions answered: 4 in ",
        f"tiny: sentences read: {len(SENTENCES)} in ", "tiny: measured in "]
    assert re.fullmatch(r"tiny: measured in \d+ s", caplog.messages[-1])
    assert int(caplog.messages[-1].split()[-2]) < 60


def test_the_material_is_read_from_the_artifacts(tmp_path: Path) -> None:
    (tmp_path / "holdout.jsonl").write_text('{"text": "Málaga"}\n{"text": "b"}\n', encoding="utf-8")
    (tmp_path / "acceptability.jsonl").write_text('{"text": "Yes.", "acceptable": true}\n')
    found = Material.read(tmp_path, tmp_path, max_length=90, max_new_tokens=8)
    assert dataclasses.replace(found, holdout=list(found.holdout)) == Material(
        [{"text": "Málaga"}, {"text": "b"}], [("Yes.", True)], 90, 8)


def test_a_sentence_is_scored_by_its_mean_token_log_probability(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    rows = scoring.measure(model, tokenizer, material(RECORDS), "tiny").values["sentences"]
    means = []
    for text, _good in SENTENCES:
        ids = tokenizer(text)["input_ids"]
        means.append(-slow_nll(model, ids, 1) / (len(ids) - 1))
    assert [row["score"] for row in rows] == pytest.approx(means, abs=1e-5)
    assert [(row["line"], row["acceptable"]) for row in rows] == [
        (line, int(good)) for line, (_, good) in enumerate(SENTENCES, 1)]


def test_plain_text_has_perplexity_and_no_rouge(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    found = scoring.measure(model, tokenizer, material(TEXTS), "tiny")
    scores, generations = found.summary, found.generations
    assert scores["perplexity"] > 1 and scores["rougeL"] is None and scores["questions"] == 0 and generations == []


def test_records_that_are_too_long_are_left_out_and_counted(
        loaded: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = loaded
    lengths = sorted(len(encode(tokenizer, record)[0]) for record in RECORDS)
    found = scoring.measure(model, tokenizer, material(RECORDS, max_length=lengths[1]), "tiny")
    scores, generations = found.summary, found.generations
    assert (scores["records"], scores["records_too_long"], len(generations)) == (2, 2, 2)
    assert f"tiny: 2 of 4 held-out records have more than {lengths[1]} tokens and are left out" in caplog.messages
    caplog.clear()
    scoring.measure(model, tokenizer, material(RECORDS), "tiny")
    assert not any("left out" in message for message in caplog.messages)
    with pytest.raises(UserError, match=f"none of the 4 held-out records fits: the shortest has {lengths[0]} tokens"):
        scoring.measure(model, tokenizer, material(RECORDS, max_length=lengths[0] - 1), "tiny")
    with pytest.raises(UserError, match="none of the 0 held-out records fits: the shortest has 0 tokens"):
        scoring.measure(model, tokenizer, material([]), "tiny")


def test_the_encoded_holdout_gives_the_same_scores_as_encoding_it_here(
        loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Also of a record that is several sequences, and without those that the encoding job left out."""
    model, tokenizer = loaded
    lengths = sorted(len(encode(tokenizer, record)[0]) for record in RECORDS)
    here = material(RECORDS, max_length=lengths[2])
    rows = [(line, encode(tokenizer, record)[0]) for line, record in enumerate(RECORDS, 1)]
    write_split(tmp_path / "holdout.arrow", [row for row in rows if len(row[1]) <= lengths[2]])
    there = dataclasses.replace(here, encoded=encoded.Split(tmp_path / "holdout.arrow"))
    assert scoring.measure(model, tokenizer, there, "tiny") == scoring.measure(model, tokenizer, here, "tiny")
    write_split(tmp_path / "twice.arrow", [(line, each) for line, each in rows for _ in range(2)])
    twice = dataclasses.replace(material(RECORDS), encoded=encoded.Split(tmp_path / "twice.arrow"))
    once, both = (scoring.measure(model, tokenizer, each, "tiny").summary for each in (material(RECORDS), twice))
    assert both["records"] == once["records"] == 4
    assert both["completion_tokens"] == 2 * once["completion_tokens"]


def test_what_the_model_cannot_read_or_has_nothing_to_score_is_left_out(loaded: tuple[Any, Any]) -> None:
    """A record longer than the model's positions, whatever max_length allows; and a text of no token but the end."""
    odd = [{"text": "The cook reads the book. " * 40}, {"text": ""}]
    scores = scoring.measure(*loaded, material([*RECORDS, *odd], max_length=1000), "tiny").summary
    assert (scores["records"], scores["records_too_long"]) == (4, 2)


def test_a_sentence_beyond_the_positions_of_the_model_is_scored_as_far_as_they_go(loaded: tuple[Any, Any]) -> None:
    """GPT-2 would end in an index error; and a sentence of one token has nothing that could be scored."""
    odd = [*SENTENCES, ("The cook reads the book. " * 40, True), ("x", True), ("xq", True)]
    scores = scoring.measure(*loaded, Material(RECORDS, odd, 90, 4), "tiny").summary
    assert scores["sentences"] == len(SENTENCES) + 2


def test_too_few_judged_sentences_is_an_error_that_names_the_setting(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match=r"evaluation\.acceptability: needs at least two acceptable"):
        scoring.measure(*loaded, Material(RECORDS, SENTENCES[:7], 90, 4), "tiny")


def test_scores_that_are_not_numbers_are_recorded_as_not_measured(loaded: tuple[Any, Any]) -> None:
    """JSON has no NaN, and the gate must see that there is no value."""
    import copy

    import torch

    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    scores = scoring.measure(model, tokenizer, material(RECORDS), "tiny").summary
    assert scores["perplexity"] is None and scores["acceptability_mcc"] is None


def test_batches_hold_every_item_once_within_the_budget() -> None:
    lengths = [3, 50, 7, 7, 120, 1, 20]
    made = list(scoring.batches(lengths, 60))
    assert sorted(i for batch in made for i in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 60 for batch in made)
    assert [lengths[i] for batch in made for i in batch] == sorted(lengths, reverse=True), "memory is short at once"


def test_models_with_the_same_tokens_have_the_same_vocabulary_digest(tmp_path: Path) -> None:
    one, same, other = (tiny_tokenizer(tmp_path / name, vocabulary=size)
                        for name, size in (("a", 300), ("b", 300), ("c", 310)))
    assert scoring.vocabulary(one) == scoring.vocabulary(same) != scoring.vocabulary(other)
    assert re.fullmatch("[0-9a-f]{16}", scoring.vocabulary(one))
    ids: list[Any] = [SimpleNamespace(get_vocab=lambda ids=ids: ids) for ids in (
        {"a": 0, "b": 1}, {"b": 1, "a": 0}, {"a": 1, "b": 0})]
    assert scoring.vocabulary(ids[0]) == scoring.vocabulary(ids[1]) != scoring.vocabulary(ids[2])


def test_an_empty_sequence_list_measures_nothing(loaded: tuple[Any, Any]) -> None:
    sequences: list[Encoded] = []
    assert scoring.negative_log_likelihoods(loaded[0], sequences, Progress("test", 0)) == []


def test_only_so_many_questions_are_answered_and_the_rest_is_still_read(loaded: tuple[Any, Any]) -> None:
    """Three models do not answer 100,000 questions: ROUGE is over the first by sha256, perplexity over all records."""
    all_answered = scoring.measure(*loaded, material(RECORDS), "tiny")
    found = scoring.measure(*loaded, dataclasses.replace(material(RECORDS), answered_records=3), "tiny")
    assert (found.summary["questions"], found.summary["questions_left_out"], found.summary["records"]) == (3, 1, 4)
    assert (all_answered.summary["questions"], all_answered.summary["questions_left_out"]) == (4, 0)
    assert found.summary["perplexity"] == all_answered.summary["perplexity"]
    lines = answered_lines(RECORDS, 3)
    assert [answer["record"] for answer in found.generations] == lines
    assert found.generations == [answer for answer in all_answered.generations if answer["record"] in lines]
    assert found.summary["rougeL"] == pytest.approx(sum(answer["rougeL"] for answer in found.generations) / 3)
