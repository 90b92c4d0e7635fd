"""Counts the requests and tokens of each key, alias and version; serving/events.py has the metrics.

vLLM reports the tokens of a complete reply to middleware, in `request.state.request_metadata`. So the guard needs to
read neither replies nor streams for it, and asks nothing of vLLM that the client did not ask for. If the client cuts a
reply off, vLLM reports nothing; then the state of its engine tells what was read and generated until then.
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

from starlette.types import Message, Receive, Scope

from serving import events

log = logging.getLogger("serving")


class Usage:
    """Counts one request, while it is used as a context manager.

    Args:
        labels: the name of the key, the alias (or the base model's name) and the digest.
        engine: vLLM's EngineClient; None before the start.
        adapter: the name inside vLLM of the LoRA adapter that it uses; None if it uses none.
    """

    def __init__(self, labels: tuple[str, str, str], engine: Any, adapter: str | None = None) -> None:
        self._labels = labels
        self._engine = engine
        self._adapter = adapter
        self._state: dict[str, Any] = {}
        self._until_cut: tuple[int, int] | None = None  # tokens of prompt and completion

    def __enter__(self) -> Usage:
        events.requested(*self._labels)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        reported = getattr(self._state.get("request_metadata"), "final_usage_info", None)
        if reported:
            prompt, completion = reported.prompt_tokens, reported.completion_tokens or 0
        else:
            prompt, completion = self._until_cut or (0, 0)
        events.used(*self._labels, prompt=prompt, completion=completion)

    def scope(self, scope: Scope) -> Scope:
        """The request's scope with a state of its own, in which vLLM reports."""
        self._state = dict(scope.get("state", {}))
        return {**scope, "state": self._state}

    def receive(self, receive: Receive) -> Receive:
        """The client's messages. When it disconnects, vLLM forgets the request after this."""

        async def watched() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and self._until_cut is None:
                metadata = self._state.get("request_metadata")
                self._until_cut = (_in_progress(self._engine, metadata.request_id, self._adapter) if metadata
                                   else (0, 0))
            return message

        return watched


def _in_progress(engine: Any, request_id: str, adapter: str | None) -> tuple[int, int]:
    """The tokens of prompts and completions of a request that the engine still computes.

    Of several sequences (`n`), those that are complete already are not counted. Clients choose the id (X-Request-Id);
    requests with the same id for another adapter are not counted.
    """
    prompts = completions = 0
    try:
        processor = engine.output_processor
        for each, sequences in processor.external_req_ids.items():
            # A request with several prompts has one in the engine for each, with a number at its end.
            if each == request_id or (each.startswith((f"{request_id}-", f"{request_id}_"))
                                      and each[len(request_id) + 1:].isdecimal()):
                states = [state for i in sequences if (state := processor.request_states.get(i))
                          and state.lora_name == adapter]
                prompts += max((state.prompt_len for state in states), default=0)
                completions += sum(state.detokenizer.num_output_tokens() for state in states)
    except (AttributeError, TypeError) as error:
        log.debug("this vLLM's engine does not tell what it computes: %r", error)
    return prompts, completions
