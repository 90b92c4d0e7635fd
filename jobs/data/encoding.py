"""Records as tokens: the same rendering for training, evaluation and, through the chat template, serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """A sequence of tokens, and which of them are learned and scored.

    A record is one sequence, or several: where the template renders a finished turn otherwise than it asked for it,
    each turn of the assistant is a sequence of its own.
    """

    tokens: Sequence[int]
    learned: Sequence[tuple[int, int]]  # ranges of tokens, [first, last), in order; the last one is the answer

    @classmethod
    def of(cls, prompt: Sequence[int], completion: Sequence[int]) -> Encoded:
        """A prompt and its completion, which is what is learned. The prompt of a {"text"} is empty."""
        ends = (len(prompt), len(prompt) + len(completion))
        return cls([*prompt, *completion], [ends] if completion else [])

    @property
    def prompt(self) -> Sequence[int]:
        """All that is before the answer."""
        return self.tokens[: self.learned[-1][0]] if self.learned else self.tokens

    @property
    def completion(self) -> Sequence[int]:
        """The answer."""
        return self.tokens[self.learned[-1][0]:] if self.learned else []

    @property
    def scored(self) -> int:
        """How many tokens are learned and scored: those of the ranges, less a first one that nothing precedes."""
        return sum(last - first for first, last in self.learned) - any(first == 0 for first, _ in self.learned)

    def labels(self) -> list[int]:
        """A label for each token: itself where it is learned, else -100."""
        labels = [-100] * len(self.tokens)
        for first, last in self.learned:
            labels[first:last] = self.tokens[first:last]
        return labels

    def __len__(self) -> int:
        return len(self.tokens)


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


def encode_question(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]],
                    template: Mapping[str, Any] | None = None) -> list[int]:
    """The tokens up to where the answer starts: through the tokenizer's chat template where it has one, exactly as
    vLLM's chat endpoint renders them; else the messages' texts, a line each."""
    if tokenizer.chat_template:
        return _ids(tokenizer.apply_chat_template(messages, add_generation_prompt=True, **(template or {})))
    return _ids(tokenizer("".join(m["content"] + "\n" for m in messages)))


def encode(tokenizer: PreTrainedTokenizerBase, record: Record,
           template: Mapping[str, Any] | None = None) -> list[Encoded]:
    """Tokenize a record; the completion ends with the token that ends a reply.

    With a chat template the completion is what the template adds for the last message; tokens after its last end
    token (templates often add a newline) are left out, because generation stops before them.

    Args:
        template: the arguments of the chat template: `chat_template` of the environment.
    """
    messages = question(record)
    if messages is None:
        return [Encoded.of([], [*_ids(tokenizer(answer(record))), _eos(tokenizer)])]
    prompt = encode_question(tokenizer, messages, template)
    if tokenizer.chat_template:
        finished = [*messages, {"role": "assistant", "content": answer(record)}]
        whole = _ids(tokenizer.apply_chat_template(finished, **(template or {})))
        if whole[: len(prompt)] == prompt:
            completion = whole[len(prompt):]
            if _eos(tokenizer) in completion:
                last = len(completion) - 1 - completion[::-1].index(_eos(tokenizer))
                return [Encoded.of(prompt, completion[: last + 1])]
            return [Encoded.of(prompt, [*completion, _eos(tokenizer)])]
        # The template renders a finished answer otherwise than a prompt: train on the prompt that serving renders.
    return [Encoded.of(prompt, [*_ids(tokenizer(answer(record), add_special_tokens=False)), _eos(tokenizer)])]


def _ids(encoding: Any) -> list[int]:
    return list(encoding["input_ids"])


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.eos_token_id, int), "load_tokenizer rejects tokenizers without one"
    return tokenizer.eos_token_id
