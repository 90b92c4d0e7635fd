"""Promises of packed training, for every architecture that can be trained: a pack has the loss and the gradients of
its records one by one, and costs no more than they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.core import attention, models
from jobs.data.encoding import Encoded
from jobs.training import packing

VOCABULARY = 97
ARCHITECTURES = sorted(models.SERVABLE | models.MERGED_ONLY)
# Shorter than some of the records below: a sliding window of attention, where a model has one, cuts something off.
WINDOW = 5


def build(architecture: str) -> Any:
    """A random model of four heads, two of them for keys and values where the architecture groups heads."""
    import transformers as t

    t.set_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 2}
    own: dict[str, dict[str, Any]] = {
        "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "OPTForCausalLM": {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "Gemma2ForCausalLM": {"head_dim": 8, "sliding_window": WINDOW, "final_logit_softcapping": 3.0,
                              "attn_logit_softcapping": 1.0},
        "Gemma3ForCausalLM": {"head_dim": 8, "sliding_window": WINDOW,
                              "layer_types": ["sliding_attention", "full_attention"]},
        "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        "Qwen3ForCausalLM": {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW,
                             "max_window_layers": 1},
        "SmolLM3ForCausalLM": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        "MistralForCausalLM": {"sliding_window": WINDOW}, "Phi3ForCausalLM": {"sliding_window": WINDOW},
        "GraniteForCausalLM": {"logits_scaling": 4.0, "attention_multiplier": 0.3},
    }
    if architecture not in ("GPT2LMHeadModel", "OPTForCausalLM"):
        sizes["intermediate_size"] = 64
    model_class = getattr(t, architecture)
    config = model_class.config_class(**(sizes | own.get(architecture, {})))
    model = model_class._from_config(config, attn_implementation="eager" if "Gemma2" in architecture else "sdpa")
    model.config.use_cache = False
    return model.eval()


def pack() -> list[Encoded]:
    """Records of 2 to 20 tokens: one of a single learned token, one of several turns, one without a completion."""
    import random

    pick = random.Random(0)
    shapes: list[tuple[int, list[tuple[int, int]]]] = [
        (20, [(4, 20)]), (2, [(1, 2)]), (13, [(0, 13)]), (18, [(3, 7), (12, 18)]), (7, []), (5, [(4, 5)])]
    return [Encoded([pick.randrange(3, VOCABULARY) for _ in range(tokens)], learned) for tokens, learned in shapes]


def one_by_one(model: Any, records: list[Encoded]) -> Any:
    """The definition of the loss: each record alone, all logits, the mean over all learned tokens."""
    import torch

    total = torch.zeros(())
    for record in records:
        ids, labels = torch.tensor(record.tokens), torch.tensor(record.labels())
        logits = model(input_ids=ids[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    return total / sum(record.scored for record in records)


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pack_has_the_loss_and_the_gradients_of_its_records_one_by_one(architecture: str) -> None:
    import torch

    model, records = build(architecture), pack()
    expected = one_by_one(model, records)
    wanted = gradients(model, expected)
    attention.attend_by_record(model)
    assert model.config._attn_implementation == attention.NAME
    loss = model(**packing.flatten(records)).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    found = gradients(model, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_a_model_that_bends_its_attention_scores_is_loaded_so_that_it_does(tmp_path: Path) -> None:
    model = build("Gemma2ForCausalLM")
    model.save_pretrained(tmp_path)
    expected = one_by_one(model, pack()).item()
    assert one_by_one(models.load_model(tmp_path), pack()).item() == pytest.approx(expected, abs=1e-5)


def test_no_attention_between_records_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the dense way takes 20 times as long as this for 2048 tokens of 50-token records."""
    import torch

    computed = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Any, key: Any, *more: Any, **named: Any) -> Any:
        computed.append((query.shape[2], key.shape[2]))
        return original(query, key, *more, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model, records = build("LlamaForCausalLM"), pack()
    attention.attend_by_record(model)
    model(**packing.flatten(records))
    assert computed == [(len(record), len(record)) for record in records] * model.config.num_hidden_layers


# --- on a GPU, of which there is none here ---------------------------------------------------------------------------


def kernel(query: Any, key: Any, value: Any, ends: Any, _: Any, longest: int, *__: Any, scale: float | None = None,
           window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False) -> Any:
    """What torch says of its `varlen_attn`, as a definition."""
    import torch

    assert query.dtype in (torch.bfloat16, torch.float16), "the kernel takes nothing else"
    assert longest >= int(ends.diff().max()) and ends.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] == 0
    outputs = []
    for q, k, v in zip(*(each.split(ends.diff().tolist()) for each in (query, key, value)), strict=True):
        seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()
        if window_size[0] >= 0:
            seen = seen.triu(-window_size[0])
        outputs.append(torch.nn.functional.scaled_dot_product_attention(
            *(each.transpose(0, 1)[None] for each in (q, k, v)), attn_mask=seen, scale=scale,
            enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(outputs)


def set_kernel(monkeypatch: pytest.MonkeyPatch, to: Any) -> None:
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", to)


@pytest.mark.parametrize("architecture", [each for each in ARCHITECTURES if each != "Gemma2ForCausalLM"])
def test_on_a_gpu_a_pack_is_one_kernel_with_the_loss_of_its_records(
        monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """In bfloat16, as the kernel computes."""
    import torch

    model, records, calls = build(architecture), pack(), []
    expected = one_by_one(model, records).item()

    def counted(*inputs: Any, **named: Any) -> Any:
        calls.append(1)
        return kernel(*inputs, **named)

    set_kernel(monkeypatch, counted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    works = attention.kernel_works
    monkeypatch.setattr(attention, "kernel_works", lambda config, device: device == "cuda" and works(config, "cpu"))
    attention.attend_by_record(model)
    assert model.config._attn_implementation == attention.IN_ONE_KERNEL
    calls.clear()
    loss = model.to(torch.bfloat16)(**packing.flatten(records)).loss
    assert len(calls) == model.config.num_hidden_layers
    assert loss.item() == pytest.approx(expected, abs=0.05)


def leaking(query: Any, key: Any, value: Any, ends: Any, *_: Any, **named: Any) -> Any:
    return kernel(query, key, value, ends[[0, -1]], None, len(query), **named)


def one_too_far(*inputs: Any, window_size: tuple[int, int], **named: Any) -> Any:
    left = window_size[0] + (window_size[0] >= 0)
    return kernel(*inputs, window_size=(left, 0), **named)


def missing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("no kernel image is available")


def not_finite(*inputs: Any, **named: Any) -> Any:
    return kernel(*inputs, **named) * float("nan")


def without_gradients(*inputs: Any, **named: Any) -> Any:
    return kernel(*inputs, **named).detach()


@pytest.mark.parametrize("wrong", [leaking, one_too_far, missing, not_finite, without_gradients])
def test_a_gpu_whose_kernel_does_not_compute_that_keeps_what_it_had(
        monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    import torch

    models_of = {name: build(name) for name in ("LlamaForCausalLM", "OPTForCausalLM", "Gemma2ForCausalLM")}
    config = models_of["LlamaForCausalLM"].config
    set_kernel(monkeypatch, kernel)
    assert attention.kernel_works(config, "cpu")
    assert not attention.kernel_works(models_of["Gemma2ForCausalLM"].config, "cpu"), "it bends scores"
    set_kernel(monkeypatch, wrong)
    assert not attention.kernel_works(config, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "kernel_works", lambda *_: False)
    for model in models_of.values():
        attention.attend_by_record(model)
    assert [model.config._attn_implementation for model in models_of.values()] == ["sdpa", attention.NAME, "eager"]


# ----------------------------------------------------------------------------------------------------------------------


def test_padded_rows_are_refused_instead_of_computed_wrong() -> None:
    import torch

    model = build("LlamaForCausalLM")
    attention.attend_by_record(model)
    with pytest.raises(AssertionError, match="takes one pack without padding"):
        model(input_ids=torch.tensor([[5, 6, 7], [8, 9, 2]]), attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))


def test_logits_are_computed_where_a_token_is_learned_and_nowhere_else() -> None:
    model, records = build("LlamaForCausalLM"), pack()
    attention.attend_by_record(model)
    batch = packing.flatten(records)
    assert model(**batch).logits.shape == (1, sum(record.scored for record in records), VOCABULARY)
    assert batch["shift_labels"].tolist() == [[token for record in records for first, last in record.learned
                                               for token in record.tokens[max(first, 1):last]]]
