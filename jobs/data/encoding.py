"""Records as tokens: the same rendering for training, evaluation and, through the chat template, serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.data.chat import OTHER_TEXT, Chat, RecordError, named, special_tokens, stop_tokens
from jobs.data.records import is_preference, prompt_of, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """A sequence of tokens, and which of them are learned and scored.

    A record is one sequence, or several: where the template renders a turn in a later prompt otherwise than it was
    learned, the later turn is a sequence of its own.
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

    @property
    def sequences(self) -> list[Encoded]:
        """What attends to itself alone: this one."""
        return [self]

    @property
    def unlearned(self) -> Encoded:
        """The same tokens, of which nothing is learned."""
        return Encoded(self.tokens, [])

    def has_text(self, special: AbstractSet[int]) -> bool:
        """Whether any token that is learned and scored is text."""
        return any(token not in special for first, last in self.learned for token in self.tokens[max(first, 1) : last])

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Pair:
    """A preference as training reads it: the prompt with the chosen answer, and with the rejected one."""

    chosen: Encoded
    rejected: Encoded

    @property
    def sequences(self) -> list[Encoded]:
        """Both sequences; neither attends to the other."""
        return [self.chosen, self.rejected]

    @property
    def unlearned(self) -> Pair:
        """The same tokens, of which nothing is learned."""
        return Pair(self.chosen.unlearned, self.rejected.unlearned)

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


Example = Encoded | Pair  # what training learns from at once


def question(record: Record) -> list[Record] | None:
    """The messages before the answer; None for a {"text"} record, which has no question."""
    messages = messages_of(record)
    return messages[:-1] if messages else None


def prompt_messages(record: Record) -> list[Record]:
    """The messages of a question without an answer: {"prompt"} or {"messages"}, as the records of tasks are."""
    return list(record["messages"]) if "messages" in record else [{"role": "user", "content": record["prompt"]}]


def answer(record: Record) -> str:
    """What the record answers: the completion, the last message with its tool calls, or the whole text."""
    return answers(record)[-1]


def answers(record: Record) -> list[str]:
    """All texts of a record that are learned: every answer of a conversation, except one that nobody asked for. Of a
    preference the chosen one."""
    messages = messages_of(record)
    if messages is None:
        return [str(record["text"])]
    if is_preference(record):
        return [record["chosen"]]
    return [text_of(message) for message in messages[1:] if message["role"] == "assistant"]


def messages_of(record: Record) -> list[Record] | None:
    """The record as a conversation, with the chosen answer of a preference; None for a {"text"}."""
    if "text" in record:
        return None
    if "messages" in record:
        return list(record["messages"])
    answer = record["chosen" if is_preference(record) else "completion"]
    return [*prompt_of(record), {"role": "assistant", "content": answer}]


def encode(tokenizer: PreTrainedTokenizerBase, record: Record,
           template: Mapping[str, Any] | None = None) -> list[Encoded]:
    """Tokenize a record: every turn of the assistant is learned, after the prompt that serving renders for it.

    What is learned of a turn is what the chat template adds for it to its prompt, up to the token at which serving
    stops. Turns share a sequence as long as the template renders them in the next prompt as they were learned. Of a
    preference, the chosen answer alone is learned.

    Args:
        template: the arguments of the chat template: `chat_template` of the environment.
    Raises:
        RecordError: the template rejects the record or leaves out a part of it, or an answer holds a token that ends a
            reply.
    """
    messages = messages_of(record)
    if messages is None:
        _check_stops(tokenizer, "text", record["text"])
        return [Encoded.of([], _stopped(tokenizer, _ids(tokenizer, record["text"], special=True)))]
    if is_preference(record):
        return encode_pair(tokenizer, record, template)[:1]
    chat = Chat(tokenizer, template or {}, record.get("tools"))
    sequences: list[Encoded] = []
    seen = 0  # messages that were looked at
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or not turn:  # serving answers at least one message
            continue
        prompt, completion = _turn(chat, messages[: turn + 1], seen)
        seen, learned = turn + 1, [(len(prompt), len(prompt) + len(completion))]
        if sequences and prompt[: len(sequences[-1])] == sequences[-1].tokens:
            learned = [*sequences.pop().learned, *learned]
        sequences.append(Encoded([*prompt, *completion], learned))
    return sequences


def encode_for_training(tokenizer: PreTrainedTokenizerBase, record: Record,
                        template: Mapping[str, Any] | None = None) -> list[Encoded]:
    """As `encode`; of a preference both answers: see `encode_pair`."""
    return (encode_pair if is_preference(record) else encode)(tokenizer, record, template)


def encode_pair(tokenizer: PreTrainedTokenizerBase, record: Record,
                template: Mapping[str, Any] | None = None) -> list[Encoded]:
    """Tokenize a preference: the prompt with the chosen answer, and with the rejected one. These answers alone
    are learned, whoever spoke before.

    Raises:
        RecordError: as `encode`; or the tokenizer leaves both answers the same tokens.
    """
    chat, prompt = Chat(tokenizer, template or {}), prompt_of(record)
    pair = []
    for key in ("chosen", "rejected"):
        try:
            pair.append(Encoded.of(*_turn(chat, [*prompt, {"role": "assistant", "content": record[key]}], 0)))
        except RecordError as error:
            raise RecordError(f"`{key}`: {error}") from None
    if pair[0].tokens == pair[1].tokens:
        raise RecordError("`chosen` and `rejected` are the same tokens: there is nothing to prefer")
    return pair


def encode_question(tokenizer: PreTrainedTokenizerBase, record: Record,
                    template: Mapping[str, Any] | None = None) -> list[int]:
    """The tokens of a question without an answer, {"prompt"} or {"messages"}: what serving makes of it.

    Args:
        template: the arguments of the chat template: `chat_template` of the environment.
    Raises:
        RecordError: the template rejects the messages or leaves out a part of them.
    """
    messages = prompt_messages(record)
    chat = Chat(tokenizer, template or {}, record.get("tools"))
    prompt = chat.render(messages, prompt=True)
    chat.require_rendered([*messages, {"role": "assistant", "content": ""}], 0, prompt, prompt)
    return _ids(tokenizer, prompt, special=not tokenizer.chat_template)


def _turn(chat: Chat, messages: Sequence[Record], seen: int) -> tuple[list[int], list[int]]:
    """The tokens of the prompt for the last message, and of what is learned of it."""
    tokenizer, name, text = chat.tokenizer, named(messages, len(messages) - 1), text_of(messages[-1])
    _check_stops(tokenizer, name, text)
    prompt, finished = chat.render(messages[:-1], prompt=True), chat.render(messages, prompt=False)
    chat.require_rendered(messages, seen, prompt, finished)
    # A chat template has the tokens that begin a text; without one the tokenizer adds them.
    begins = not tokenizer.chat_template
    prompt_ids = _ids(tokenizer, prompt, special=begins)
    ids = _ids(tokenizer, finished, special=begins)
    if finished.startswith(prompt) and ids[: len(prompt_ids)] == prompt_ids:
        added = ids[len(prompt_ids):]
    else:
        start = len(prompt) if finished.startswith(prompt) else _start_of_turn(chat, messages, prompt, finished)
        added = _ids(tokenizer, finished[start:])
    completion = _stopped(tokenizer, added)
    special = special_tokens(tokenizer)
    if special.issuperset(completion) and not special.issuperset(_ids(tokenizer, text)):
        raise RecordError(f"{name}: before it the chat template has a token at which serving ends a reply")
    left = tokenizer.decode(added[len(completion):], skip_special_tokens=True).strip()
    if left and text.rstrip().endswith(left):
        raise RecordError(f"{name}: inside of it the chat template has a token at which serving ends a reply")
    return prompt_ids, completion


def _start_of_turn(chat: Chat, messages: Sequence[Record], prompt: str, finished: str) -> int:
    """Where the last message starts in `finished`, which does not start with `prompt`: some templates render a finished
    conversation otherwise than a prompt. It is where another answer would make a difference."""
    if chat.render(messages, prompt=False) != finished:
        raise RecordError(f"{named(messages, len(messages) - 1)}: the chat template renders it otherwise each time")
    other = chat.render([*messages[:-1], {"role": "assistant", "content": OTHER_TEXT}], prompt=False)
    if other == finished:
        raise RecordError(f"{named(messages, len(messages) - 1)}: the chat template leaves it out")
    start = next((at for at, (one, two) in enumerate(zip(finished, other, strict=False)) if one != two),
                 min(len(finished), len(other)))
    while start and finished[start - 1].isspace() and not prompt.endswith(finished[start - 1]):  # Mistral's blank
        start -= 1
    return start


def _check_stops(tokenizer: PreTrainedTokenizerBase, what: str, text: str) -> None:
    for stop in stop_tokens(tokenizer).values():
        if stop in text:
            raise RecordError(f"{what}: holds {stop}, at which serving ends a reply. Remove it")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _stopped(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    """The tokens up to the first at which serving stops; the end token is added where there is none."""
    stops = stop_tokens(tokenizer)
    for number, token in enumerate(tokens):
        if token in stops:
            return tokens[: number + 1]
    assert isinstance(tokenizer.eos_token_id, int), "load_tokenizer rejects tokenizers without one"
    return [*tokens, tokenizer.eos_token_id]
