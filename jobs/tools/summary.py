"""What `jobs local` shows at the end: the evaluation, an answer from each model, and where everything is."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from jobs.core import artifacts
from jobs.core.artifacts import Spec
from jobs.core.errors import RetryableError
from jobs.core.pipeline import Pipeline
from jobs.core.plan import plan
from jobs.evaluation import content
from jobs.tools.waiting import ALIAS_SECONDS, Late, served_adapter, wait_until


def path_of(spec: Spec, volumes: Path) -> Path:
    """Where the artifact is, or will be, in `volumes`, which holds one folder a claim, named X-pvc."""
    return volumes / f"{spec.volume}-pvc" / spec.kind / spec.digest


def read(pipeline: Pipeline, volumes: Path) -> dict[str, Any] | None:
    """The pipeline's evaluation, from its artifact; None when no Job of the overlay made one."""
    folder = path_of(plan(pipeline).evaluation, volumes)
    if not folder.exists():
        return None
    return content.read_evaluation(artifacts.read(folder).path)


def evaluation(values: dict[str, Any]) -> str:
    """The evaluation as a table for a terminal."""
    from jobs.evaluation import report

    return f"\n{report.table(values)}\n"


def chats(pipeline: Pipeline, volumes: Path) -> bool:
    """Whether the tokenizer has a chat template; without one vLLM takes completions only (GPT-2)."""
    folder = path_of(plan(pipeline).tokenizer, volumes)
    if not folder.exists():  # no Job of the overlay relocates one
        return False
    artifacts.read(folder)
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template")))


def ask(pipeline: Pipeline, volumes: Path, endpoint: str, question: str) -> str:
    """The question, answered by the base model and by the adapter, through the `openai` client.

    In mode merged the fine-tuned model answers alone: it is served instead of the base model.

    Raises:
        RetryableError: the adapter is not served in time, or the endpoint does not answer.
    """
    from openai import OpenAI, OpenAIError

    name, digest = pipeline.adapter, plan(pipeline).adapter.digest
    try:
        wait_until(f"{name}@{digest} to be served", lambda: served_adapter(endpoint, name) == digest, ALIAS_SECONDS,
                   every=0.5)
    except Late:
        raise RetryableError(f"{name}@{digest} is promoted but was not served within {ALIAS_SECONDS:.0f} s; the log of "
                             "model-inference has the reason") from None
    with OpenAI(base_url=f"{endpoint}/v1", api_key=os.environ.get("VLLM_API_KEY", "not-needed")) as client:
        try:
            return _answers(client, pipeline, question, chats=chats(pipeline, volumes))
        except OpenAIError as error:
            raise RetryableError(f"{endpoint}: {error}; the log of model-inference has the reason") from None


def _answers(client: Any, pipeline: Pipeline, question: str, *, chats: bool) -> str:
    answers = {}
    models = [(f"fine-tuned ({pipeline.adapter})", pipeline.adapter)]
    if pipeline.environment.serving.mode == "lora":
        models.insert(0, (f"base model ({pipeline.environment.base_model.name})", pipeline.environment.base_model.name))
    for title, model in models:
        options: Any = {"model": model, "temperature": 0, "max_tokens": pipeline.evaluation.max_new_tokens}
        if chats:
            reply = client.chat.completions.create(**options, messages=[{"role": "user", "content": question}])
            answers[title] = (reply.choices[0].message.content or "").strip()
        else:
            answers[title] = client.completions.create(**options, prompt=f"{question}\n").choices[0].text.strip()
    width = max(map(len, answers))
    return "\n".join([f"  {question}", *(f"    {title:<{width}}  {answer}" for title, answer in answers.items()), ""])


def places(pipeline: Pipeline, volumes: Path, endpoint: str | None, tensorboard: str | None, question: str, *,
           serving: bool) -> str:
    """Where a person finds the report, TensorBoard and the endpoint, and how to ask it `question`.

    Args:
        endpoint: None when the overlay serves no model.
        tensorboard: None when the overlay has no TensorBoard.
        serving: whether they go on answering.
    """
    report = path_of(plan(pipeline).evaluation, volumes) / "report.html"
    lines = [f"  Report       file://{report}"] if report.exists() else []
    if not serving:
        servers = [f"{name} {url}" for name, url in (("TensorBoard", tensorboard), ("Endpoint", endpoint)) if url]
        stopped = [f"  Stopped      {', '.join(servers)} (without --exit they keep answering)"] if servers else []
        return "\n".join([*lines, *stopped])
    if tensorboard:
        lines.append(f"  TensorBoard  {tensorboard}")
    if endpoint:
        chat = chats(pipeline, volumes)
        request: dict[str, Any] = {"model": pipeline.adapter, "temperature": 0}  # the answer above, not a sample
        request |= {"messages": [{"role": "user", "content": question}]} if chat else {"prompt": f"{question}\n"}
        shared = pipeline.environment
        models = [pipeline.adapter, *([shared.base_model.name] if shared.serving.mode == "lora" else [])]
        url = f"{endpoint}/v1/{'chat/completions' if chat else 'completions'}"
        lines += [f"  Endpoint     {endpoint}/v1  (models: {', '.join(models)})",
                  "", f"  curl {url} -H 'content-type: application/json' \\",
                  f"    -d {shlex.quote(json.dumps(request, ensure_ascii=False))}"]
    return "\n".join([*lines, "", "Running until you press Ctrl-C."])
