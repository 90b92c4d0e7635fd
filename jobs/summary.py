"""What `jobs local` shows at the end: the evaluation, an answer from each model, and where everything is."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

from jobs import artifacts
from jobs.errors import RetryableError
from jobs.pipeline import Pipeline
from jobs.plan import plan

ALIAS_SECONDS = 120.0  # from readiness to the promoted adapter: verifying, loading and proving it takes seconds


def read(pipeline: Pipeline, volumes: Path) -> dict[str, Any]:
    """The pipeline's evaluation, from its artifact. `volumes` holds one folder a claim, named X-pvc."""
    spec = plan(pipeline).evaluation
    folder = artifacts.read(volumes / f"{spec.volume}-pvc" / spec.kind / spec.digest).path
    evaluation: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return evaluation


def evaluation(values: dict[str, Any]) -> str:
    """The evaluation as a table for a terminal."""
    from jobs import report

    return f"\n{report.table(values)}\n"


def ask(pipeline: Pipeline, endpoint: str, question: str) -> str:
    """The question, answered by the base model and by the adapter, through the `openai` client."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{endpoint}/v1", api_key=os.environ.get("VLLM_API_KEY", "not-needed"))
    _wait_for(client, pipeline.adapter)
    answers = {}
    for title, model in ((f"base model ({pipeline.base_model.name})", pipeline.base_model.name),
                         (f"fine-tuned ({pipeline.adapter})", pipeline.adapter)):
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0,
            max_tokens=pipeline.evaluation.max_new_tokens)
        answers[title] = (reply.choices[0].message.content or "").strip()
    width = max(map(len, answers))
    return "\n".join([f"  {question}", *(f"    {title:<{width}}  {answer}" for title, answer in answers.items()), ""])


def _wait_for(client: Any, model: str) -> None:
    """Wait until `model` is listed: the guard takes a promoted adapter in after verifying and proving it."""
    deadline = time.monotonic() + ALIAS_SECONDS
    while model not in {listed.id for listed in client.models.list()}:
        if time.monotonic() > deadline:
            raise RetryableError(f"{model} is promoted but was not served within {ALIAS_SECONDS:.0f} s; the reason "
                                 "stands in the log of model-inference")
        time.sleep(0.5)


def places(pipeline: Pipeline, volumes: Path, endpoint: str, tensorboard: str, question: str, *,
           serving: bool) -> str:
    """Where a person finds the report, TensorBoard and the endpoint, and how to ask it `question`."""
    spec = plan(pipeline).evaluation
    report = volumes / f"{spec.volume}-pvc" / spec.kind / spec.digest / "report.html"
    lines = [f"  Report       file://{report}"]
    if serving:
        request = {"model": pipeline.adapter, "temperature": 0,  # the answer above, not a sample
                   "messages": [{"role": "user", "content": question}]}
        lines += [f"  TensorBoard  {tensorboard}",
                  f"  Endpoint     {endpoint}/v1  (models: {pipeline.adapter}, {pipeline.base_model.name})",
                  "", f"  curl {endpoint}/v1/chat/completions -H 'content-type: application/json' \\",
                  f"    -d {shlex.quote(json.dumps(request, ensure_ascii=False))}", "",
                  "Serving until you press Ctrl-C."]
    else:
        lines += [f"  TensorBoard  {tensorboard} and the endpoint {endpoint}/v1 answered while this ran; without "
                  "--exit they keep answering"]
    return "\n".join(lines)
