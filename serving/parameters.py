"""What a client's request asks of vLLM's engine.

Where a value has several spellings (`"true"`, `1`, `"16"`), vLLM's own class for the request reads it, so that the
guard and vLLM cannot read two things. Most requests have no such value; those are not parsed twice.
"""

from __future__ import annotations

from functools import cache
from typing import Any

CHAT = "/v1/chat/completions"


@cache
def _class(path: str) -> Any:
    """vLLM's class for the requests to `path`. It is loaded long since where vLLM runs."""
    if path == CHAT:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        return ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    return CompletionRequest


def parse(path: str, request: dict[str, Any]) -> Any | None:
    """The request as vLLM reads it, with a field for each parameter; None if vLLM refuses it. May change `request`.

    Raises:
        RecursionError: when it is nested too deeply.
    """
    try:
        return _class(path).model_validate(request)
    except RecursionError:
        raise
    except Exception:  # of several kinds, also ones that vLLM answers with 500; what is wrong, vLLM says itself
        return None


def sequences(path: str, request: dict[str, Any]) -> int:
    """How many sequences the engine generates for the request: `n` (with beam search, the beam width) for each prompt.

    An upper bound where vLLM will refuse the request anyhow.
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
    if not isinstance(value, list) or all(type(token) is int for token in value):  # a text, or one prompt's tokens
        return 1
    return len(value)


def wants_prompt_logprobs(path: str, request: dict[str, Any]) -> bool:
    """Whether vLLM would compute log-probabilities of the request's prompt."""
    if request.get("echo") is None and request.get("prompt_logprobs") is None:
        return False
    parsed = parse(path, request)
    if parsed is None:
        return False
    if path == CHAT:  # there `top_logprobs`, which is never unset, is what `echo` takes
        return parsed.prompt_logprobs is not None or bool(parsed.echo)
    return parsed.prompt_logprobs is not None or bool(parsed.echo and parsed.logprobs is not None)
