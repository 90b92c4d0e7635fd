"""What `jobs local` shows at the end: the verdicts, an answer from each model, and where everything is.

Each evaluation's full table is in the log of its Job, so that the verdicts here stay short however many adapters there
are.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.core import artifacts, imported
from jobs.core.artifacts import Spec
from jobs.core.environment import Environment
from jobs.core.errors import RetryableError
from jobs.core.imported import Adapter, ImportedAdapter
from jobs.core.metrics import score_of
from jobs.core.pipeline import Evaluation
from jobs.core.plan import EnvironmentPlan, deciding_evaluation, plan, plan_environment, plan_import
from jobs.core.published import WITHOUT_ANSWERS
from jobs.evaluation import content, report
from jobs.evaluation.gate import Check
from jobs.tools.waiting import ALIAS_SECONDS, Late, served_adapter, wait_until

IN_DETAIL = 3  # up to so many adapters, every rule is shown with its scores; of more, only rules that do not hold
NAMED = 8  # models that are listed by name; `GET /v1/models` has all


@dataclass(frozen=True)
class Result:
    """An adapter that was evaluated."""

    pipeline: Adapter
    digest: str
    evaluation: content.Evaluation
    report: Path

    @property
    def name(self) -> str:
        return self.pipeline.adapter

    @property
    def passed(self) -> bool:
        return bool(self.evaluation["passed"])


def served(results: Sequence[Result]) -> list[Result]:
    """The adapters that the server serves: those that passed; in mode merged the first of them by name, since a server
    then runs one model."""
    passed = [result for result in results if result.passed]
    return passed[:1] if passed and passed[0].pipeline.environment.serving.mode == "merged" else passed


def path_of(spec: Spec, volumes: Path) -> Path:
    """Where the artifact is, or will be, in `volumes`, which holds one folder a claim, named X-pvc."""
    return volumes / f"{spec.volume}-pvc" / spec.kind / spec.digest


def results(pipelines: Sequence[Adapter], volumes: Path) -> list[Result]:
    """The evaluations of these adapters, from their artifacts; without those that no Job made or brought."""
    found = []
    for pipeline in pipelines:
        specs = _specs(pipeline, volumes)
        folder = path_of(specs[1], volumes) if specs else None
        if specs and folder and folder.exists():
            # Of what was published, the report may be that without private texts.
            page = next((file for file in (folder / "report.html", folder / WITHOUT_ANSWERS / "report.html")
                         if file.exists()), folder)
            found.append(Result(pipeline, specs[0].digest, content.read_evaluation(artifacts.read(folder).path), page))
    return found


def _specs(pipeline: Adapter, volumes: Path) -> tuple[Spec, Spec] | None:
    """The adapter and its evaluation; None for an imported one that is not there."""
    if not isinstance(pipeline, ImportedAdapter):
        return plan(pipeline).adapter, plan(pipeline).evaluation
    record = plan_import(pipeline).imported_adapter
    if not path_of(record, volumes).exists():
        return None
    found = imported.read(path_of(record, volumes), record.volume)
    return found.adapter, deciding_evaluation(pipeline, found)


def verdicts(results: Sequence[Result]) -> str:
    """The verdict on each adapter for a terminal: with the scores behind every rule if there are few adapters, else
    with the rules that do not hold."""
    lines: list[str] = []
    detailed = len(results) <= IN_DETAIL
    width = max(len(f"{result.name}@{result.digest}") for result in results)
    for result in results:
        lines += [*_scores(result), ""] if detailed else [
            f"  {f'{result.name}@{result.digest}':<{width}}  {content.verdict(result.evaluation)}",
            *report.unmet_rules(result.evaluation, indent=4)]
    notes = [f"  {content.EMBEDDED}", ""] if any(result.evaluation["embedded"] for result in results) else []
    return "\n".join(["", *lines, *([] if detailed else [""]), *notes])


def _scores(result: Result) -> list[str]:
    """Verdict, the scores that the gate has rules on, of every model, and each rule with what was found."""
    evaluation = result.evaluation
    checks = content.checks(evaluation)
    scores = {check.metric: score_of(check.metric) for check in checks}
    return [*report.wrapped(f"{result.name}@{result.digest} {content.verdict(evaluation)} on "
                            f"{evaluation['scores']['fine_tuned']['records']} held-out records", 2, 4),
            *(f"    {line}" for line in report.scores_table(evaluation, scores.values())),
            *(line for check in checks for line in _rule(check))]


def _rule(check: Check) -> list[str]:
    """A rule that holds in one line, as the scores are above it; any other with all that was found."""
    if check.outcome != "passed" or check.reason:
        return report.rule_lines(check, indent=4)
    return report.wrapped(f"{content.MARKS[check.outcome]} {check.metric}: {check.expression} is {check.bound_text} "
                          f"({check.confidence * 100:g} %), must be {check.requirement}", 4, 8)


def chats(environment: Environment, volumes: Path) -> bool:
    """Whether the tokenizer has a chat template; without one vLLM takes completions only (GPT-2)."""
    folder = path_of(_tokenizer(environment), volumes)
    if not folder.exists():  # no Job of the overlay relocates one
        return False
    artifacts.read(folder)
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template")))


def _tokenizer(environment: Environment) -> Spec:
    planned: EnvironmentPlan = plan_environment(environment)
    return planned.tokenizer


def ask(results: Sequence[Result], volumes: Path, endpoint: str, question: str) -> str:
    """The question, answered by the base model and by each adapter that is served, through the `openai` client.

    In mode merged the fine-tuned model answers alone: it is served instead of the base model.

    Raises:
        RetryableError: an adapter is not served in time, or the endpoint does not answer.
    """
    from openai import OpenAI, OpenAIError

    for result in served(results):
        _wait_until_served(result, endpoint)
    with OpenAI(base_url=f"{endpoint}/v1", api_key=os.environ.get("VLLM_API_KEY", "not-needed")) as client:
        try:
            return _answers(client, results, question, chats=chats(results[0].pipeline.environment, volumes))
        except OpenAIError as error:
            raise RetryableError(f"{endpoint}: {error}; the log of model-inference has the reason") from None


def _wait_until_served(result: Result, endpoint: str) -> None:
    title = f"{result.name}@{result.digest}"
    try:
        wait_until(f"{title} to be served", lambda: served_adapter(endpoint, result.name) == result.digest,
                   ALIAS_SECONDS, every=0.5)
    except Late:
        raise RetryableError(f"{title} is promoted but was not served within {ALIAS_SECONDS:.0f} s; the log of "
                             "model-inference has the reason") from None


def _answers(client: Any, results: Sequence[Result], question: str, *, chats: bool) -> str:
    environment = results[0].pipeline.environment
    models = [(_title(result), result.name, _tokens(result.pipeline)) for result in served(results)]
    if environment.serving.mode == "lora":
        name = environment.base_model.name
        models.insert(0, (f"base model ({name})", name, max(tokens for *_, tokens in models)))
    answers = {}
    for title, model, max_tokens in models:
        options: Any = {"model": model, "temperature": 0, "max_tokens": max_tokens}
        if chats:
            reply = client.chat.completions.create(**options, messages=[{"role": "user", "content": question}])
            answers[title] = (reply.choices[0].message.content or "").strip()
        else:
            answers[title] = client.completions.create(**options, prompt=f"{question}\n").choices[0].text.strip()
    answers |= {_title(result): "(not asked: " + ("in mode merged, one adapter is served)" if result.passed else
                                                  "it did not pass its gate)")
                for result in results if result not in served(results)}
    width = max(map(len, answers))
    return "\n".join([f"  {question}", *(f"    {title:<{width}}  {answer}" for title, answer in answers.items()), ""])


def _tokens(pipeline: Adapter) -> int:
    """How long an answer may get: as long as in the evaluation."""
    default: int = Evaluation.model_fields["max_new_tokens"].default
    return pipeline.evaluation.max_new_tokens if pipeline.evaluation else default


def _title(result: Result) -> str:
    return f"fine-tuned ({result.name})"


def places(environment: Environment, results: Sequence[Result], volumes: Path, endpoint: str | None,
           tensorboard: str | None, question: str, *, serving: bool) -> str:
    """Where a person finds the reports, TensorBoard and the endpoint, and how to ask it `question`.

    Args:
        endpoint: None when the overlay serves no model.
        tensorboard: None when the overlay has no TensorBoard.
        serving: whether they go on answering.
    """
    lines = [f"  {'Report' if n == 0 else '':<11}  file://{result.report}  ({result.name})"
             for n, result in enumerate(results)]
    if not serving:
        servers = [f"{name} {url}" for name, url in (("TensorBoard", tensorboard), ("Endpoint", endpoint)) if url]
        stopped = [f"  Stopped      {', '.join(servers)} (without --exit they keep answering)"] if servers else []
        return "\n".join([*lines, *stopped])
    if tensorboard:
        lines.append(f"  TensorBoard  {tensorboard}")
    if endpoint:
        chat = chats(environment, volumes)
        models = [*(result.name for result in served(results)),
                  *([environment.base_model.name] if environment.serving.mode == "lora" else [])]
        listed = [*models[:NAMED], *([f"{len(models) - NAMED} more"] if len(models) > NAMED else [])]
        url = f"{endpoint}/v1/{'chat/completions' if chat else 'completions'}"
        lines.append(f"  Endpoint     {endpoint}/v1  (models: {', '.join(listed)})")
        if models:
            request: dict[str, Any] = {"model": models[0], "temperature": 0}  # the answer above, not a sample
            request |= {"messages": [{"role": "user", "content": question}]} if chat else {"prompt": f"{question}\n"}
            lines += ["", f"  curl {url} -H 'content-type: application/json' \\",
                      f"    -d {shlex.quote(json.dumps(request, ensure_ascii=False))}"]
    return "\n".join([*lines, "", "Running until you press Ctrl-C."])
