"""The proof: what the evaluated model answered to a few held-out prompts. The server generates it again through vLLM.

jobs/evaluation/proof.py makes it and serving/proof.py checks it. It is the file `proof.json` of an evaluation. It holds
held-out text, as messages and as tokens: it stays on the private volume, and no message of an error quotes it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from jobs.core.declarations import Strict
from jobs.core.errors import UserError

FILE = "proof.json"
# Enough to see every fault of a whole adapter; few enough to be generated in well under a second.
PROMPTS = 8
PROMPT_TOKENS = 512  # of one prompt
ANSWER_TOKENS = 16
MESSAGES_BYTES = 2**15  # of one prompt's messages, as JSON; a proof with all limits used is below 1 MiB

# The largest relative error of rounding one number: half the distance from 1 to the next larger one.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
LARGEST_SENSITIVITY = 10_000.0  # of real models it is below 1000

Dtype = Literal["float32", "float16", "bfloat16"]

Token = Annotated[int, Field(ge=0, lt=2**31)]


class Message(Strict):
    """A message of plain text."""

    role: Literal["system", "user", "assistant"]
    content: str


class Prompt(Strict):
    """A held-out prompt."""

    record: Annotated[int, Field(ge=1)]  # its line in holdout.jsonl of the dataset
    tokens: Annotated[list[Token], Field(min_length=1, max_length=PROMPT_TOKENS)]
    # What a client would send to get these tokens from the chat template; None where that cannot be compared.
    messages: Annotated[list[Message], Field(min_length=1)] | None = None


class Answer(Strict):
    """A greedy answer, with the natural logarithm of each token's probability and how far it was before the second."""

    tokens: Annotated[list[Token], Field(min_length=1, max_length=ANSWER_TOKENS)]
    logprobs: Annotated[list[Annotated[float, Field(le=0)]], Field(max_length=ANSWER_TOKENS)]
    margins: Annotated[list[Annotated[float, Field(ge=0)]], Field(max_length=ANSWER_TOKENS)]

    @model_validator(mode="after")
    def _same_length(self) -> Answer:
        if not len(self.tokens) == len(self.logprobs) == len(self.margins):
            raise ValueError("tokens, logprobs and margins differ in length")
        return self


class Proof(Strict):
    """The answers of a model, and of the base model in the same process where clients can use both."""

    dtype: Dtype  # in which the answers were computed
    # How many times the error of rounding one number a log-probability can be off (jobs/evaluation/proof.py).
    sensitivity: Annotated[float, Field(gt=0, le=LARGEST_SENSITIVITY)]
    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=PROMPTS)]
    answers: list[Answer]  # of the fine-tuned model, one for each prompt
    base_answers: list[Answer] | None = None  # of the base model, one for each prompt

    @model_validator(mode="after")
    def _one_for_each_prompt(self) -> Proof:
        if any(len(answers) != len(self.prompts) for answers in (self.answers, self.base_answers)
               if answers is not None):
            raise ValueError("there is not one answer for each prompt")
        return self

    def to_json(self) -> str:
        return json.dumps(self.model_dump(exclude_none=True), ensure_ascii=False, allow_nan=False) + "\n"


def validate(content: Any) -> Proof:
    """A proof from parsed JSON.

    Raises:
        UserError: naming the first thing that is wrong, without its value, which may be private text.
    """
    try:
        return Proof.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{where}: {first['msg']}") from None
