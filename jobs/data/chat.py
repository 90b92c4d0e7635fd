"""The chat template: renders messages to text exactly as vLLM's chat endpoint does, or says why it cannot."""

from __future__ import annotations

import functools
import logging
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core import models
from jobs.core.errors import UserError
from jobs.core.strict_yaml import one_line
from jobs.data.records import arguments_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("jobs")

Message = Mapping[str, Any]

# A template may loop. One message takes less than a millisecond and becomes about as many characters as it has.
RENDER_SECONDS = 10.0
RENDERED_CHARACTERS = 2**26
REASON_CHARACTERS = 160  # of a template's own words, which may repeat the private text
OTHER_TEXT = "\ufffc"  # to see whether a text makes a difference
PLACES = 8  # of an answer, at which that is tried
OTHER_CALLS = [{"type": "function", "function": {"name": "other", "arguments": {}}}]


class RecordError(UserError):
    """A record that cannot be encoded. The message names the part of the record; the caller adds file and line."""


@dataclass(frozen=True)
class Chat:
    """The format of one record: its tokenizer, the arguments of the chat template, and the tools of the record."""

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any] = field(default_factory=dict)  # `chat_template` of the environment
    tools: Sequence[Mapping[str, Any]] | None = None  # in OpenAI's shape

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The messages as text: as a prompt, which ends where the answer starts; or as a finished conversation.

        Without a chat template each message is a line.

        Raises:
            RecordError: the template rejects the messages. Names the message and its role.
        """
        try:
            return self._apply(messages, prompt=prompt)
        except Exception as error:  # a template can raise anything
            number = len(messages) - 1 if isinstance(error, _TooMuch) else self._rejected(messages, error)
            reason = one_line(str(error) or type(error).__name__)
            if len(reason) > REASON_CHARACTERS:
                reason = reason[: REASON_CHARACTERS - 1] + "…"
            raise RecordError(f"{named(messages, number)}: the chat template rejects it: {reason}") from None

    def require_rendered(self, messages: Sequence[Message], first: int, prompt: str, finished: str) -> None:
        """Raise `RecordError` if the template leaves out a message from number `first` on, its calls, or the tools.

        It ignores what it renders the same for another text, call or list of tools. A text that is found word for word
        is not tried.

        Args:
            prompt: the messages but the last, as `render` makes them.
            finished: all messages, as `render` makes them.
        """
        for number, message in enumerate(messages[first:], first):
            last = number == len(messages) - 1
            found = (message.get("content") or "").strip() in (finished.removeprefix(prompt) if last else prompt)
            for key, other in (("content", None if found else OTHER_TEXT), ("tool_calls", OTHER_CALLS)):
                if not message.get(key) or not other:
                    continue
                changed = [*messages[:number], {**message, key: other}, *messages[number + 1 :]]
                if (self._renders_same(changed, False, finished) if last else
                        self._renders_same(changed[:-1], True, prompt)):
                    raise RecordError(f"{named(messages, number)}: the chat template leaves out its `{key}`")
                if last and key == "content":
                    self._require_all_of_it(messages, finished)
        if self.tools and not first and replace(self, tools=None)._renders_same(messages[:-1], True, prompt):
            raise RecordError("the chat template leaves out `tools`. Choose a base model whose template has tools")

    def _require_all_of_it(self, messages: Sequence[Message], finished: str) -> None:
        """Raise `RecordError` if the template leaves out a part of the answer, such as thoughts before it: a place at
        which another text makes no difference."""
        text = messages[-1]["content"]
        for place in range(1, 2 * PLACES, 2):
            at = place * len(text) // (2 * PLACES)
            changed = {**messages[-1], "content": text[:at] + OTHER_TEXT + text[at:]}
            if self._renders_same([*messages[:-1], changed], False, finished):
                raise RecordError(f"{named(messages, len(messages) - 1)}: the chat template leaves out a part of its "
                                  "`content`. Remove it, or bring another tokenizer")

    def _renders_same(self, messages: Sequence[Message], prompt: bool, rendered: str) -> bool:
        try:
            return self._apply(messages, prompt=prompt) == rendered
        except Exception:
            return False

    def _apply(self, messages: Sequence[Message], *, prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            if self.tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
                raise ValueError("the tokenizer has none, so it has no form for tools")
            text = "".join(message["content"] + "\n" for message in messages)
            return text if prompt else text.removesuffix("\n")
        with _time_limit(RENDER_SECONDS):
            text = str(self.tokenizer.apply_chat_template(
                [_as_vllm(message, history=prompt or message is not messages[-1]) for message in messages],
                tokenize=False, add_generation_prompt=prompt,
                tools=[_tool(tool) for tool in self.tools] if self.tools else None,
                **{"strftime_now": _strftime_now, **self.arguments}))  # type: ignore[arg-type]
        text.encode()  # raises at half a character, which is no text to a tokenizer
        if len(text) > RENDERED_CHARACTERS:
            raise _TooMuch(f"it makes {len(text)} characters of it; {RENDERED_CHARACTERS} are allowed")
        return text

    def _rejected(self, messages: Sequence[Message], error: Exception) -> int:
        """The number of the message by which the template fails: it fails the same way when the messages end there."""
        for number in range(len(messages)):
            try:
                self._apply(messages[: number + 1], prompt=False)
            except Exception as other:
                if str(other) == str(error):
                    return number
        return len(messages) - 1


def named(messages: Sequence[Message], number: int) -> str:
    """A message as an error names it."""
    return f"messages[{number}] (role {messages[number]['role']})"


@functools.lru_cache(maxsize=16)
def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, str]:
    """The tokens at which vLLM ends a reply, by id: the tokenizer's end token, and those that the model's settings
    beside the tokenizer name."""
    ids = {tokenizer.eos_token_id, *(models.stop_tokens(Path(tokenizer.name_or_path)) if tokenizer.name_or_path
                                     else ())}
    return {number: str(tokenizer.convert_ids_to_tokens(number)) for number in ids if number < len(tokenizer)}


@functools.lru_cache(maxsize=16)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that are no text: those that a reply is shown without, except the unknown token."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    text = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}  # GPT-2 has one token for both
    return frozenset((special | set(tokenizer.all_special_ids)) - text | set(stop_tokens(tokenizer)))


def _as_vllm(message: Message, *, history: bool) -> dict[str, Any]:
    """A message as vLLM hands it to the template: a content in any case, the arguments of calls as objects."""
    result = {**message, "content": message.get("content") or ""}
    if message.get("tool_calls"):
        # vLLM sorts the keys of the calls in a prompt. A model writes the name first.
        keys = ("arguments", "name") if history else ("name", "arguments")
        result["tool_calls"] = [
            {**call, "function": {key: arguments_of(call) if key == "arguments" else call["function"]["name"]
                                  for key in keys}} for call in message["tool_calls"]]
    return result


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as vLLM hands it to the template: with these keys in this order."""
    function = tool["function"]
    return {"type": "function", "function": {key: function.get(key) for key in ("name", "description", "parameters")}
            | ({"strict": function["strict"]} if function.get("strict") is not None else {})}


class _TooMuch(Exception):
    """The template takes too long or makes too much of a message."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `_TooMuch` in the body after `seconds`. Only in the main thread: others get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TooMuch(f"it does not end within {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, stop)
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, remaining)


def _strftime_now(form: str) -> str:
    _warn_of_clock()
    return datetime.now().strftime(form)  # noqa: DTZ005 - as transformers and vLLM do


@functools.cache
def _warn_of_clock() -> None:
    log.warning("the chat template reads the clock, so training and serving get the date of their own day. If the "
                "template takes a date, set it in environment.yaml, for example "
                'chat_template: {date_string: "26 Jul 2024"}')
