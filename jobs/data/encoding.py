"""Records as tokens: the same rendering for training, evaluation and, through the chat template, serving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """One record as token ids: what is given, and what is learned and scored."""

    prompt: list[int]  # empty for {"text"} records
    completion: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def question(record: Record) -> list[dict[str, str]] | None:
    """The messages before the answer; None for a {"text"} record, which has no question."""
    if "text" in record:
        return None
    if "messages" in record:
        return [dict(m) for m in record["messages"][:-1]]
    return [{"role": "user", "content": record["prompt"]}]


def answer(record: Record) -> str:
    """The text to learn: the completion, the last message, or the whole text."""
    if "text" in record:
        return str(record["text"])
    return str(record["messages"][-1]["content"] if "messages" in record else record["completion"])


def encode_question(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """The tokens up to where the answer starts: through the tokenizer's chat template where it has one, exactly as
    vLLM's chat endpoint renders them; else the messages' texts, a line each."""
    if tokenizer.chat_template:
        return _ids(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True))
    return _ids(tokenizer("".join(m["content"] + "\n" for m in messages)))


def encode(tokenizer: PreTrainedTokenizerBase, record: Record) -> Encoded:
    """Tokenize a record; the completion ends with the token that ends a reply.

    With a chat template the completion is what the template adds for the last message; tokens after its last end
    token (templates often add a newline) are left out, because generation stops before them.
    """
    messages = question(record)
    if messages is None:
        return Encoded([], [*_ids(tokenizer(answer(record))), _eos(tokenizer)])
    prompt = encode_question(tokenizer, messages)
    if tokenizer.chat_template:
        finished = [*messages, {"role": "assistant", "content": answer(record)}]
        whole = _ids(tokenizer.apply_chat_template(finished, tokenize=True))
        if whole[: len(prompt)] == prompt:
            completion = whole[len(prompt):]
            if _eos(tokenizer) in completion:
                last = len(completion) - 1 - completion[::-1].index(_eos(tokenizer))
                return Encoded(prompt, completion[: last + 1])
            return Encoded(prompt, [*completion, _eos(tokenizer)])
        # The template renders a finished answer otherwise than a prompt: train on the prompt that serving renders.
    return Encoded(prompt, [*_ids(tokenizer(answer(record), add_special_tokens=False)), _eos(tokenizer)])


def _ids(encoding: Any) -> list[int]:
    return list(encoding["input_ids"])


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.eos_token_id, int), "load_tokenizer rejects tokenizers without one"
    return tokenizer.eos_token_id
