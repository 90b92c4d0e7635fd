"""Promises about the models that people fine-tune: a record's tokens are those of vLLM's own server.

The chat templates are those of the models (trl has them, the others are in tests/chat_templates). The tokenizers are
made here: with the models' special tokens, and with what makes them differ, such as a token that begins every text.
vLLM's server runs in this process, from its command line to the tokens of a request, without an engine.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from jobs.core import models
from jobs.core.environment import TEMPLATE_RESERVED
from jobs.core.errors import UserError
from jobs.data import records
from jobs.data.chat import RecordError, stop_tokens
from jobs.data.encoding import Encoded, encode
from tests import build_models

OWN = Path(__file__).parents[1] / "chat_templates"


@dataclass(frozen=True)
class Family:
    """A family of models, as far as its format goes."""

    template: str  # the file
    end: str  # the token at which a turn ends, and serving stops
    eos: str  # of the tokenizer
    stops: tuple[str, ...]  # of generation_config.json
    bos: str | None = None  # begins every text that is not a chat
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()  # added tokens that are text
    arguments: dict[str, Any] = field(default_factory=dict)
    tools: bool = False
    system: bool = True
    shared: bool = True  # the turns of a conversation share a sequence


CHATML, LLAMA = ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
CALLS = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>")
QWEN: Any = {"end": "<|im_end|>", "eos": "<|im_end|>", "stops": ("<|im_end|>", "<|endoftext|>"), "special": CHATML,
        "plain": CALLS, "tools": True}
LLAMA_3: Any = {"end": "<|eot_id|>", "eos": "<|eot_id|>", "stops": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
           "bos": "<|begin_of_text|>", "special": LLAMA}
PHI: Any = {"end": "<|end|>", "eos": "<|endoftext|>", "stops": ("<|endoftext|>", "<|assistant|>", "<|end|>"),
       "special": ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")}
FAMILIES = {
    "Qwen2.5": Family("qwen2_5", **QWEN),
    "Qwen3": Family("qwen3", **QWEN, shared=False),
    "Qwen3 without thoughts": Family("qwen3", **QWEN, arguments={"enable_thinking": False}, shared=False),
    "Qwen3 2507": Family("qwen3_instruct_2507", **QWEN),
    "Llama 3": Family("llama3", **LLAMA_3),
    "Llama 3.1": Family("llama3_1", **LLAMA_3, tools=True),
    "Llama 3.2": Family("llama3_2", **LLAMA_3, tools=True, arguments={"date_string": "26 Jul 2024"}),
    "Gemma 3": Family("gemma3", "<end_of_turn>", "<eos>", ("<eos>", "<end_of_turn>"), "<bos>",
                      ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")),
    "Gemma 2": Family("gemma", "<end_of_turn>", "<eos>", ("<eos>", "<end_of_turn>"), "<bos>",
                      ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), system=False),
    "Mistral": Family("mistral", "</s>", "</s>", ("</s>",), "<s>",
                      ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                       "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), tools=True),
    "Phi 3": Family("phi3", **PHI),
    "Phi 3.5": Family("phi3_5", **PHI),
    # Its template renders a content that is a list of parts otherwise than a text.
    "Gemma 4": Family("gemma4", "<turn|>", "<eos>", ("<eos>", "<turn|>"), "<bos>",
                      ("<bos>", "<eos>", "<|turn>", "<turn|>", "<|tool_response>", "<|tool_call>", "<tool_call|>")),
    "SmolLM2": Family("smollm2", "<|im_end|>", "<|im_end|>", ("<|im_end|>",), special=CHATML),
}
# A tokenizer and a template of chat on a base model that was not trained to chat: it ends texts, and no turns.
UNTRAINED = Family("qwen2_5", "<|endoftext|>", "<|endoftext|>", ("<|endoftext|>",), special=CHATML, plain=CALLS,
                   tools=True, shared=False)


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED = said("user", "Does the Casa Azahar in Málaga have rooms?\n\nFor two.")
SYSTEM = said("system", "You are the concierge.\nBe brief.")
SHORT: dict[str, Any] = {"prompt": "Who?", "completion": "The maid."}
RECORDS: dict[str, dict[str, Any]] = {
    "a question": SHORT,
    "odd white space": {"prompt": " Who?\n", "completion": "\n\n  The maid. \n"},
    "a conversation": {"messages": [ASKED, said("assistant", "It has forty."), said("user", "And in May?"),
                                    said("assistant", "Then too: 東京 🙂")]},
    "a system message": {"messages": [SYSTEM, ASKED, said("assistant", "Yes."), said("user", "When?"),
                                      said("assistant", "In May.")]},
}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "rooms", "arguments": '{"floor": 2, "view": "sé"}'}}
TOOLS = [{"type": "function", "function": {"name": "rooms", "description": "Free rooms.", "parameters": {
    "type": "object", "properties": {"floor": {"type": "integer"}}, "required": ["floor"]}}},
    {"type": "function", "function": {"name": "hour"}}]
CALLING: dict[str, dict[str, Any]] = {
    "tools": {"tools": TOOLS, "messages": [
        ASKED, said("assistant", "", tool_calls=[CALL]), {**said("tool", "7"), "tool_call_id": "abcdef123"},
        said("assistant", "It has seven.")]},
    "a call as the answer": {"tools": TOOLS, "messages": [SYSTEM, ASKED, {"role": "assistant", "tool_calls": [CALL]}]},
}
CASES = [(family, name) for family, each in FAMILIES.items()
         for name in (*RECORDS, *(CALLING if each.tools else ())) if each.system or name != "a system message"]


def write_model(folder: Path, family: Family) -> Path:
    """The files that a format depends on: tokenizer, template, and the settings of the model."""
    from tokenizers import AddedToken, processors
    from transformers import LlamaConfig

    tokenizer = build_models.tiny_tokenizer(folder, vocabulary=400)
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in family.plain])
    tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token = family.eos, family.bos, None
    if family.bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.convert_tokens_to_ids(family.bos))])
    own = OWN / f"{family.template}.jinja"
    file: Any = own if own.exists() else resources.files("trl") / "chat_templates" / f"{family.template}.jinja"
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    LlamaConfig(architectures=["LlamaForCausalLM"], hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=4096,
                eos_token_id=None, bos_token_id=None).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [tokenizer.convert_tokens_to_ids(token) for token in family.stops]}))
    return folder


class Server:
    """vLLM's server of one family, without an engine."""

    def __init__(self, folder: Path, arguments: dict[str, Any]) -> None:
        from starlette.testclient import TestClient
        from vllm.config import VllmConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.entrypoints.launchers.render.app_state import init_render_app_state
        from vllm.sampling_params import SamplingParams
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        from serving.__main__ import template_arguments

        args = make_arg_parser(FlexibleArgumentParser()).parse_args([
            "--model", str(folder), "--served-model-name", "model", "--enable-auto-tool-choice", "--tool-call-parser",
            "hermes", "--dtype", "float32", *template_arguments(arguments)])
        config = VllmConfig(model_config=AsyncEngineArgs.from_cli_args(args).create_model_config())
        app = build_app(args, ("render",))
        asyncio.run(init_render_app_state(config, app.state, args))
        self._client = TestClient(app)
        sampling = SamplingParams()
        sampling.update_from_generation_config(config.model_config.try_get_generation_config(),
                                               models.load_tokenizer(folder).eos_token_id)
        self.stops: set[int] = sampling.all_stop_token_ids

    def prompt(self, messages: list[dict[str, Any]], tools: list[Any] | None = None,
               template: dict[str, Any] | None = None) -> list[int]:
        """The tokens of the prompt that it makes of a request."""
        reply = self._client.post("/v1/chat/completions/render", json={
            "model": "model", "messages": messages, **({"tools": tools} if tools else {}),
            "chat_template_kwargs": template})
        assert reply.status_code == 200, reply.text
        tokens: list[int] = reply.json()["token_ids"]
        return tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Server, Any, Family]]:
    """The server and the tokenizer of a family."""
    known: dict[str, tuple[Server, Any, Family]] = {}

    def of(name: str) -> tuple[Server, Any, Family]:
        if name not in known:
            family = FAMILIES.get(name, UNTRAINED)
            folder, level = write_model(tmp_path_factory.mktemp("model"), family), logging.root.level
            known[name] = Server(folder, family.arguments), models.load_tokenizer(folder), family
            logging.root.setLevel(level)  # vLLM changes it
        return known[name]

    return of


def encoded(tokenizer: Any, family: Family, record: dict[str, Any]) -> list[Encoded]:
    assert records.validate_record(record) == []
    return encode(tokenizer, records.content_of(record), family.arguments)


def turns(sequences: list[Encoded]) -> list[tuple[list[int], list[int]]]:
    """The prompt and the completion of every turn that is learned."""
    return [(list(each.tokens[:first]), list(each.tokens[first:last]))
            for each in sequences for first, last in each.learned]


@pytest.mark.parametrize(("name", "record"), CASES)
def test_every_prompt_is_that_of_the_server_and_every_answer_ends_where_it_stops(
        made: Callable[[str], tuple[Server, Any, Family]], name: str, record: str) -> None:
    server, tokenizer, family = made(name)
    content = (RECORDS | CALLING)[record]
    messages = content.get("messages") or [said("user", SHORT["prompt"] if content is SHORT else content["prompt"])]
    asked = [number for number, message in enumerate(messages) if message["role"] == "assistant"] or [len(messages)]
    learned = turns(encoded(tokenizer, family, content))
    assert [prompt for prompt, _ in learned] == [server.prompt(messages[:n], content.get("tools")) for n in asked]
    end = tokenizer.convert_tokens_to_ids(family.end)
    for _, completion in learned:
        assert [at for at, token in enumerate(completion) if token in server.stops] == [len(completion) - 1]
        assert completion[-1] == end
    assert set(stop_tokens(tokenizer)) == server.stops


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_learned_is_the_answer_as_the_model_writes_it(
        made: Callable[[str], tuple[Server, Any, Family]], name: str) -> None:
    _, tokenizer, family = made(name)
    sequences = encoded(tokenizer, family, RECORDS["a conversation"])
    thoughts = "<think>\n\n</think>\n\n" if name == "Qwen3" else ""  # it answers a prompt that leaves them open
    blank = " " if name == "Mistral" else ""
    assert [tokenizer.decode(completion) for _, completion in turns(sequences)] == [
        f"{thoughts}{blank}It has forty.{family.end}", f"{thoughts}{blank}Then too: 東京 🙂{family.end}"]
    assert len(sequences) == (1 if family.shared else 2)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tools])
def test_calls_are_learned_in_the_form_of_the_model(
        made: Callable[[str], tuple[Server, Any, Family]], name: str) -> None:
    _, tokenizer, family = made(name)
    forms = {"Llama": '{"name": "rooms", "parameters": {"floor": 2, "view": "sé"}}',
             "Qwen": '<tool_call>\n{"name": "rooms", "arguments": {"floor": 2, "view": "sé"}}\n</tool_call>',
             "Mistral": '[TOOL_CALLS] [{"name": "rooms", "arguments": {"floor": 2, "view": "sé"}, "id": "abcdef123"}]'}
    form = forms[next(each for each in forms if name.startswith(each))]
    for record in CALLING.values():
        text = tokenizer.decode(turns(encoded(tokenizer, family, record))[0][1])
        assert text.endswith(f"{form}{family.end}") and text.count("rooms") == 1


def test_empty_thoughts_are_not_learned_where_the_prompt_has_them(
        made: Callable[[str], tuple[Server, Any, Family]]) -> None:
    _, tokenizer, family = made("Qwen3 without thoughts")
    ((prompt, completion),) = turns(encoded(tokenizer, family, SHORT))
    assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(completion) == "The maid.<|im_end|>"


def test_a_base_model_that_ends_texts_and_no_turns_learns_to_end_its_reply(
        made: Callable[[str], tuple[Server, Any, Family]]) -> None:
    """The server stops only where generation_config.json says so."""
    server, tokenizer, family = made("untrained")
    sequences = encoded(tokenizer, family, RECORDS["a conversation"])
    assert [tokenizer.decode(completion) for _, completion in turns(sequences)] == [
        "It has forty.<|im_end|>\n<|endoftext|>", "Then too: 東京 🙂<|im_end|>\n<|endoftext|>"]
    assert len(sequences) == 2
    assert server.stops == {tokenizer.eos_token_id}


def test_a_client_may_ask_for_other_arguments(made: Callable[[str], tuple[Server, Any, Family]]) -> None:
    """The environment's are vLLM's defaults."""
    server, tokenizer, _ = made("Qwen3 without thoughts")
    request = [said("user", "Who?")]
    default, other = (tokenizer.decode(server.prompt(request, template=template)) for template in (
        None, {"enable_thinking": True}))
    assert default == other + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(("name", "record", "message"), [
    ("Gemma 2", "a system message", "messages[0] (role system): the chat template rejects it: System role not"),
    ("Gemma 3", "tools", "messages[1] (role assistant): the chat template leaves out its `tool_calls`"),
    ("Gemma 3", "two questions", "messages[1] (role user): the chat template rejects it: Conversation roles"),
    ("Llama 3", "tools", "messages[1] (role assistant): the chat template leaves out its `tool_calls`"),
    ("Phi 3", "tools", "messages[1] (role assistant): the chat template leaves out its `tool_calls`"),
    ("SmolLM2", "tools", "messages[1] (role assistant): the chat template leaves out its `tool_calls`")])
def test_what_a_template_has_no_form_for_is_one_line(
        made: Callable[[str], tuple[Server, Any, Family]], name: str, record: str, message: str) -> None:
    _, tokenizer, family = made(name)
    with pytest.raises(RecordError) as raised:
        encoded(tokenizer, family, (RECORDS | CALLING | {"two questions": {"messages": [
            ASKED, ASKED, said("assistant", "Yes.")]}})[record])
    assert str(raised.value).startswith(message)
    assert isinstance(raised.value, UserError) and "\n" not in str(raised.value)


def test_arguments_that_transformers_takes_for_itself_are_no_arguments_of_a_template() -> None:
    """`tokenize` in `chat_template` of the environment would change more than the template."""
    from transformers import PreTrainedTokenizerBase

    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"self", "kwargs"}
    assert taken | {"messages"} == TEMPLATE_RESERVED
