"""Makes the proof of an evaluation: the measured model's greedy answers to a few held-out prompts, token by token.

The server generates them again through vLLM before it serves the adapter (serving/proof.py). It compares tokens and
log-probabilities, so the proof also records how exactly they can agree: `Proof.sensitivity`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, get_args

from jobs.core.artifacts import canonical
from jobs.core.proof import (
    ANSWER_TOKENS,
    LARGEST_SENSITIVITY,
    MESSAGES_BYTES,
    PROMPT_TOKENS,
    PROMPTS,
    Answer,
    Dtype,
    Message,
    Prompt,
    Proof,
)
from jobs.data.chat import Chat, RecordError
from jobs.data.encoding import Encoded, Record, encode, question
from jobs.evaluation.scoring import Material, stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("jobs")

PLAIN_ROLES = ("system", "user", "assistant")


def record(model: Any, tokenizer: PreTrainedTokenizerBase, material: Material) -> Proof | None:
    """The proof of a model; of a PEFT model with the base model's own answers, for its adapter switched off.

    None, with a warning, if the model's logits are not finite numbers: the server will not serve it.
    """
    from peft import PeftModel

    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    prompts = choose(tokenizer, material, max(1, min(PROMPT_TOKENS, positions - ANSWER_TOKENS)))
    found = {}
    for whose in ("answers", "base_answers") if isinstance(model, PeftModel) else ("answers",):
        with model.disable_adapter() if whose == "base_answers" else nullcontext():
            found[whose] = _answers(model, tokenizer, [prompt.tokens for prompt in prompts], positions)
    sensitivity = max(sensitivity for _, sensitivity in found.values())
    if not math.isfinite(sensitivity):
        log.warning("no proof can be made: the model's logits are not finite numbers")
        return None
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    assert dtype in get_args(Dtype), f"load_model computes in {dtype}"
    return Proof(dtype=dtype, sensitivity=min(sensitivity, LARGEST_SENSITIVITY), prompts=prompts,  # type: ignore[arg-type]
                 **{whose: answers for whose, (answers, _) in found.items()})


def choose(tokenizer: PreTrainedTokenizerBase, material: Material, limit: int) -> list[Prompt]:
    """At most `PROMPTS` held-out prompts, of all lengths up to `limit` tokens: the records sorted by that length are
    divided into so many parts, and of each part the one with the smallest hash is taken.

    If every prompt is longer, the beginnings of the shortest are taken. A record of plain text has no prompt; its first
    half stands for one.
    """
    tokens = _prompts(tokenizer, material)
    lines = sorted(tokens, key=lambda line: (len(tokens[line]), line))
    lines = [line for line in lines if len(tokens[line]) <= limit] or lines[:PROMPTS]
    parts = min(PROMPTS, len(lines))
    ends = [len(lines) * part // parts for part in range(parts + 1)]
    chosen = [min(lines[first:last], key=lambda line: _hash(material.holdout[line - 1]))
              for first, last in itertools.pairwise(ends)]
    return [Prompt(record=line, tokens=tokens[line][:limit],
                   messages=_messages(tokenizer, material.holdout[line - 1], material.template, tokens[line])
                   if len(tokens[line]) <= limit else None) for line in chosen]


def _prompts(tokenizer: PreTrainedTokenizerBase, material: Material) -> dict[int, list[int]]:
    """The tokens before the last answer of each held-out record, by line."""
    sequences: dict[int, Encoded] = {}
    if material.encoded is not None:
        sequences = dict(zip(material.encoded.records.tolist(), material.encoded, strict=True))  # the last one stays
    else:
        for line, held_out in enumerate(material.holdout, 1):
            sequences[line] = encode(tokenizer, held_out, material.template)[-1]
    return {line: list(each.prompt) or list(each.tokens[: max(1, len(each) // 2)]) for line, each in sequences.items()
            if len(each)}


def _hash(record: Record) -> bytes:
    return hashlib.sha256(canonical(record)).digest()


def _messages(tokenizer: PreTrainedTokenizerBase, record: Record, template: Mapping[str, Any],
              tokens: Sequence[int]) -> list[Message] | None:
    """The messages that the chat template renders to these tokens; None if vLLM might render them otherwise.

    These are messages with tools, which vLLM takes only with flags of its own, and templates that read the clock: they
    render another date on another day.
    """
    messages = question(record)
    if not messages or not tokenizer.chat_template or record.get("tools") or any(
            message["role"] not in PLAIN_ROLES or message.get("tool_calls") for message in messages):
        return None
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    if len(json.dumps(plain)) > MESSAGES_BYTES:
        return None
    another_day = {"strftime_now": lambda form: "another day"}
    try:
        text = Chat(tokenizer, {**another_day, **template}).render(plain, prompt=True)
    except RecordError:
        return None
    if list(tokenizer(text, add_special_tokens=False)["input_ids"]) != list(tokens):
        return None
    return [Message(**message) for message in plain]


def _answers(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]],
             positions: int) -> tuple[list[Answer], float]:
    """The model's greedy answers, up to the first token at which vLLM ends a reply, and their sensitivity.

    The sensitivity is in units of the rounding error u of one number. Every step of a model rounds. Two engines add up
    in different orders, so their roundings differ as if by chance, and errors add up as in a random walk: after L
    layers the hidden state is off by about u * sqrt(L) of its length, in a direction that has nothing to do with any
    token. So each logit is off by about u * sqrt(L) * s, where s is the standard deviation of the logits over the
    vocabulary: it is what a random direction contributes to a logit. The logit itself is rounded too, by u * |logit|.
    A log-probability is a logit less the logarithm of a sum over all of them, and a margin the difference of two: each
    has twice the error of a logit at most. serving/proof.py multiplies, and says what was measured.

    An infinite sensitivity: some logit is not a finite number.
    """
    import torch
    from transformers import GenerationConfig

    stops, longest = stop_tokens(model, tokenizer), max(map(len, prompts))
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    ids = torch.full((len(prompts), longest), int(tokenizer.pad_token_id))
    attended = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt):] = torch.tensor(prompt)
        attended[row, longest - len(prompt):] = 1
    with torch.inference_mode():
        written = model.generate(input_ids=ids.to(model.device), attention_mask=attended.to(model.device),
                                 max_new_tokens=max(1, min(ANSWER_TOKENS, positions - longest)),
                                 return_dict_in_generate=True, output_logits=True)
        logits = torch.stack(written.logits, dim=1).float()  # answers, tokens, vocabulary
        generated = written.sequences[:, longest:]
        probable = logits.log_softmax(-1).gather(-1, generated[..., None])[..., 0]
        top = logits.topk(2, dim=-1).values
        margins = top[..., 0] - top[..., 1]
        depth = math.sqrt(model.config.get_text_config().num_hidden_layers)
        sensitivity = depth * logits.std(-1) + logits.abs().amax(-1)
    found, largest = [], 0.0
    for row, tokens in enumerate(generated.tolist()):
        length = next((at for at, token in enumerate(tokens, 1) if token in stops), len(tokens))
        of_answer = sensitivity[row, :length]
        if not bool(of_answer.isfinite().all()):
            return [], math.inf
        largest = max(largest, float(of_answer.max()))
        found.append(Answer(tokens=tokens[:length],
                            logprobs=[min(0.0, value) for value in probable[row, :length].tolist()],
                            margins=margins[row, :length].tolist()))
    return found, largest
