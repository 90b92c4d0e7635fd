"""What `jobs local` shows at the end: the evaluation, an answer from each model, and where everything is."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

from jobs.core import artifacts
from jobs.core.errors import RetryableError
from jobs.core.pipeline import Pipeline
from jobs.core.plan import plan
from jobs.evaluation import content

# From readiness to the promoted adapter. Verifying, loading and proving it takes seconds; in mode merged the server
# restarts with it, which takes a minute with a small model.
ALIAS_SECONDS = 300.0


def read(pipeline: Pipeline, volumes: Path) -> dict[str, Any]:
    """The pipeline's evaluation, from its artifact. `volumes` holds one folder a claim, named X-pvc."""
    spec = plan(pipeline).evaluation
    return content.read_evaluation(artifacts.read(volumes / f"{spec.volume}-pvc" / spec.kind / spec.digest).path)


def evaluation(values: dict[str, Any]) -> str:
    """The evaluation as a table for a terminal."""
    from jobs.evaluation import report

    return f"\n{report.table(values)}\n"


def chats(pipeline: Pipeline, volumes: Path) -> bool:
    """Whether the tokenizer has a chat template; without one vLLM takes completions only (GPT-2)."""
    spec = plan(pipeline).tokenizer
    folder = artifacts.read(volumes / f"{spec.volume}-pvc" / spec.kind / spec.digest).path
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template")))


def ask(pipeline: Pipeline, endpoint: str, question: str, *, chats: bool) -> str:
    """The question, answered by the base model and by the adapter, through the `openai` client.

    In mode merged the fine-tuned model answers alone: it is served instead of the base model.
    """
    from openai import OpenAI

    client = OpenAI(base_url=f"{endpoint}/v1", api_key=os.environ.get("VLLM_API_KEY", "not-needed"))
    _wait_for(client, pipeline.adapter)
    answers = {}
    models = [(f"fine-tuned ({pipeline.adapter})", pipeline.adapter)]
    if pipeline.serving.mode == "lora":
        models.insert(0, (f"base model ({pipeline.base_model.name})", pipeline.base_model.name))
    for title, model in models:
        options: Any = {"model": model, "temperature": 0, "max_tokens": pipeline.evaluation.max_new_tokens}
        if chats:
            reply = client.chat.completions.create(**options, messages=[{"role": "user", "content": question}])
            answers[title] = (reply.choices[0].message.content or "").strip()
        else:
            answers[title] = client.completions.create(**options, prompt=f"{question}\n").choices[0].text.strip()
    width = max(map(len, answers))
    return "\n".join([f"  {question}", *(f"    {title:<{width}}  {answer}" for title, answer in answers.items()), ""])


def _wait_for(client: Any, model: str) -> None:
    """Wait until `model` is listed: the guard takes a promoted adapter in after verifying and proving it."""
    from openai import APIConnectionError

    deadline = time.monotonic() + ALIAS_SECONDS
    while True:
        with contextlib.suppress(APIConnectionError):  # while it restarts
            if model in {listed.id for listed in client.models.list()}:
                return
        if time.monotonic() > deadline:
            raise RetryableError(f"{model} is promoted but was not served within {ALIAS_SECONDS:.0f} s; the reason "
                                 "stands in the log of model-inference")
        time.sleep(0.5)


def places(pipeline: Pipeline, volumes: Path, endpoint: str, tensorboard: str, question: str, *,
           serving: bool, chats: bool) -> str:
    """Where a person finds the report, TensorBoard and the endpoint, and how to ask it `question`."""
    spec = plan(pipeline).evaluation
    report = volumes / f"{spec.volume}-pvc" / spec.kind / spec.digest / "report.html"
    lines = [f"  Report       file://{report}"]
    if serving:
        request: dict[str, Any] = {"model": pipeline.adapter, "temperature": 0}  # the answer above, not a sample
        request |= {"messages": [{"role": "user", "content": question}]} if chats else {"prompt": f"{question}\n"}
        models = [pipeline.adapter, *([pipeline.base_model.name] if pipeline.serving.mode == "lora" else [])]
        url = f"{endpoint}/v1/{'chat/completions' if chats else 'completions'}"
        lines += [f"  TensorBoard  {tensorboard}",
                  f"  Endpoint     {endpoint}/v1  (models: {', '.join(models)})",
                  "", f"  curl {url} -H 'content-type: application/json' \\",
                  f"    -d {shlex.quote(json.dumps(request, ensure_ascii=False))}", "",
                  "Serving until you press Ctrl-C."]
    else:
        lines += [f"  TensorBoard  {tensorboard} and the endpoint {endpoint}/v1 answered while this ran; without "
                  "--exit they keep answering"]
    return "\n".join(lines)
