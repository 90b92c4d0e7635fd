"""Loads, probes and removes adapters in vLLM, by the name that vLLM knows (NAME@DIGEST).

Loading and probing use vLLM's HTTP API, behind the guard, like a client with the API key.

Removing takes two steps. `/v1/unload_lora_adapter` only makes vLLM's API server forget the name. The weights keep their
slot and their memory in the engine until the least recently used adapter is evicted, which may be an idle one that is
served; its next request would then read the disk in the engine's loop, and all requests would wait. So the engine must
remove the weights, too.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from jobs.core.proof import Prompt
from serving.refusal import Refused

CALL_SECONDS = 300.0  # for one call of vLLM; a probe waits behind clients' requests
PROBE_PROMPT = "Question: What is this about? Answer:"

Logprobs = dict[tuple[int, str], float]  # by position and token


@dataclass(frozen=True)
class Generated:
    """A greedy answer: the prompt's tokens, its own, and their log-probabilities."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


class Engine:
    """vLLM's API server and engine in this process.

    Args:
        vllm: the ASGI application that the guard wraps.
    """

    def __init__(self, vllm: ASGIApp) -> None:
        self._vllm = vllm
        self._state: Any = None
        self._requests: dict[str, Any] = {}  # vLLM's LoRARequest of each adapter that was loaded

    def attach(self, state: Any) -> None:
        """Call it when vLLM is up.

        Args:
            state: of vLLM's application; it holds the engine and the list of adapters.
        """
        self._state = state

    @property
    def slots(self) -> int:
        """How many adapters the engine computes with at once (--max-loras)."""
        return int(self._state.engine_client.vllm_config.lora_config.max_loras)

    @property
    def most_in_memory(self) -> int:
        """How many adapters the engine keeps in main memory (--max-cpu-loras)."""
        return int(self._state.engine_client.vllm_config.lora_config.max_cpu_loras)

    async def activate(self, model: str, folder: Path) -> None:
        """Put an adapter into a slot. If it is not in memory, it is read from `folder` first.

        Raises:
            Refused: with reason `load`, when vLLM cannot load it.
        """
        if model not in self._requests:
            await self.load(model, folder)
            return
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await self._state.engine_client.add_lora(self._requests[model])
        except Exception as error:
            raise Refused("load", f"vLLM cannot load {model} again: {error!r}") from None

    async def evict(self, model: str) -> None:
        """Free the adapter's memory and its slot. vLLM keeps its name and can load it again."""
        if model in self._requests:
            async with asyncio.timeout(CALL_SECONDS):
                await self._state.engine_client.remove_lora(self._requests[model].lora_int_id)

    async def load(self, model: str, folder: Path) -> None:
        """Load the adapter in `folder` for the first time.

        Raises:
            Refused: with reason `load`, when vLLM cannot load it.
        """
        status, reply = await self._post("/v1/load_lora_adapter", {"lora_name": model, "lora_path": str(folder)})
        if status != 200:
            raise Refused("load", f"vLLM cannot load it: {reply}")
        self._requests[model] = self._state.openai_serving_models.lora_requests[model]

    async def remove(self, model: str) -> None:
        """Make vLLM forget the adapter; no request may use it any more. Does nothing if it was never loaded."""
        status, reply = await self._post("/v1/unload_lora_adapter", {"lora_name": model})
        if status not in (200, 404):  # 404: vLLM does not know the name
            raise RuntimeError(f"vLLM does not unload {model}: {reply}")
        await self.evict(model)
        self._requests.pop(model, None)

    async def logprobs(self, model: str) -> Logprobs:
        """The log-probabilities of the most likely tokens after a fixed prompt.

        Raises:
            Refused: with reason `values`, when they are not finite.
            RuntimeError: for any other answer, for example if vLLM is overloaded; a later attempt may succeed.
        """
        # As a stream: there, values that are not finite are null, or -9999 for minus infinity. Without a stream, vLLM
        # answers with the status of any other internal error.
        status, reply = await self._post("/v1/completions", {
            "model": model, "prompt": PROBE_PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 5, "stream": True})
        try:
            if status != 200:
                raise ValueError(f"status {status}")
            tops = [top for event in _events(reply) for choice in event["choices"] if choice.get("logprobs")
                    for top in choice["logprobs"]["top_logprobs"]]
            found = {(i, token): value for i, top in enumerate(tops) for token, value in top.items()}
            if not found:
                raise ValueError("no log-probabilities")
            finite = all(value is not None and math.isfinite(value) and value > -9999 for value in found.values())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RuntimeError(f"vLLM does not answer the probe of {model} ({error!r}): {reply[:500]}") from None
        if not finite:
            raise Refused("values", "vLLM cannot compute finite probabilities with it")
        return found

    @property
    def precision(self) -> str:
        """The type in which the engine computes, by torch's name."""
        config = self._state.engine_client.vllm_config
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        # On a GPU, vLLM's kernels multiply float32 as TF32, whose 11 bits are those of float16.
        return "float16" if dtype == "float32" and config.device_config.device_type != "cpu" else dtype

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt and its answer together (--max-model-len)."""
        return int(self._state.engine_client.vllm_config.model_config.max_model_len)

    async def generate(self, model: str, prompt: Prompt, tokens: int) -> Generated:
        """The greedy answer to a prompt, of at most so many tokens: by the chat endpoint if the prompt has messages.

        Raises:
            Refused: with reason `proof`, when vLLM finds fault with the request.
            RuntimeError: for any other answer, for example if vLLM is overloaded; a later attempt may succeed.
        """
        # All that can change the choice of a token: the base model's generation_config.json has other defaults. Salted:
        # nothing is taken from the cache of prefixes, which an adapter of the same name may have filled.
        body = {"model": model, "max_tokens": tokens, "temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0,
                "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "return_token_ids": True,
                "cache_salt": secrets.token_hex(16)}
        if prompt.messages:
            status, reply = await self._post("/v1/chat/completions", {
                **body, "messages": [message.model_dump() for message in prompt.messages], "logprobs": True,
                "top_logprobs": 0})
        else:
            status, reply = await self._post("/v1/completions", {**body, "prompt": prompt.tokens, "logprobs": 0})
        if status == 400:  # without its words, which may repeat the prompt
            raise Refused("proof", "vLLM rejects the prompt")
        try:
            if status != 200:
                raise ValueError(f"status {status}")
            answered = json.loads(reply)
            choice = answered["choices"][0]
            logprobs = choice["logprobs"]
            values = [each["logprob"] for each in logprobs["content"]] if prompt.messages else \
                logprobs["token_logprobs"]
            found = Generated((answered if prompt.messages else choice)["prompt_token_ids"], choice["token_ids"],
                              [float(value) for value in values])
            if len(found.tokens) != len(found.logprobs) or not isinstance(found.prompt, list):
                raise ValueError("incomplete")
        except (ValueError, LookupError, TypeError) as error:
            # Without the reply, which may hold private text.
            raise RuntimeError(f"vLLM does not answer a prompt of the proof of {model} ({error!r})") from None
        return found

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        transport = httpx.ASGITransport(app=self._vllm, raise_app_exceptions=False)
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        client = httpx.AsyncClient(transport=transport, base_url="http://vllm")
        async with asyncio.timeout(CALL_SECONDS), client:
            reply = await client.post(path, json=body, headers=headers)
        return reply.status_code, reply.text


def _events(stream: str) -> list[dict[str, Any]]:
    """The events of a complete stream. Raises `ValueError` for an incomplete one."""
    data = [line.removeprefix("data: ") for line in stream.split("\n") if line.startswith("data: ")]
    if not data or data.pop() != "[DONE]":
        raise ValueError("the stream broke off")
    return [json.loads(each) for each in data]
