"""Reads the parameters of a request that matter to the guard's limits.

If a value has several spellings (`"true"`, `1`, `"16"`), vLLM's own class parses the request, so that the guard and
vLLM read the same value. Most requests have no such value and are not parsed twice.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

CHAT = "/v1/chat/completions"


@cache
def _class(path: str) -> Any:
    """vLLM's class for the requests to `path`. vLLM itself has imported it already."""
    if path == CHAT:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        return ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    return CompletionRequest


def parse(path: str, request: dict[str, Any]) -> Any | None:
    """The request as vLLM reads it, with a field for each parameter; None if vLLM refuses it.

    Raises:
        RecursionError: when it is nested too deeply.
    """
    try:
        # A copy: vLLM's validators change what they get, and the next check must read what vLLM will.
        return _class(path).model_validate(copy.deepcopy(request))
    except RecursionError:
        raise
    except Exception:  # of several types, some of which vLLM answers with 500; vLLM reports the error
        return None


def sequences(path: str, request: dict[str, Any]) -> int:
    """The number of sequences that the engine generates: `n` (with beam search, the beam width) for each prompt.

    An upper bound for requests that vLLM refuses, and for token ids that are not JSON integers (`1.0`).
    """
    n = request.get("n")
    if n is not None and type(n) is not int:
        parsed = parse(path, request)
        n = parsed.n if parsed else None
    prompts = 1 if path == CHAT else _prompts(request.get("prompt")) + _prompts(request.get("prompt_embeds"))
    return max(n or 1, 1) * max(prompts, 1)


def _prompts(value: Any) -> int:
    if value is None:
        return 0
    if not isinstance(value, list) or all(type(token) is int for token in value):  # a text, or one prompt's token ids
        return 1
    return len(value)


def wants_prompt_logprobs(path: str, request: dict[str, Any]) -> bool:
    """Whether vLLM would compute log-probabilities of the prompt."""
    if request.get("echo") is None and request.get("prompt_logprobs") is None:
        return False
    parsed = parse(path, request)
    if parsed is None:
        return False
    if path == CHAT:  # in chat, `echo` uses `top_logprobs`, which always has a value
        return parsed.prompt_logprobs is not None or bool(parsed.echo)
    return parsed.prompt_logprobs is not None or bool(parsed.echo and parsed.logprobs is not None)
