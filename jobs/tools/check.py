"""Validate an overlay, or one of its adapters, with no network and no cluster: what a pre-commit hook or CI runs.

Checks the environment file and every pipeline file, that every source is pinned, that data in git matches its pin and
that every record of it is valid, that the held-out records can decide the gate's rules, that vLLM can serve the base
model's architecture in the desired mode, that the ConfigMaps fit, that folders, names and entries of the adapters
agree, and that every patch has an effect. What is wrong with one adapter does not keep the others from being checked.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jobs.core import models, strict_yaml
from jobs.core.declarations import Loaded, Source
from jobs.core.environment import LoadedEnvironment
from jobs.core.errors import UserError
from jobs.core.imported import EvaluatedImport, LoadedAdapter, LoadedImport
from jobs.core.metrics import metric_of, score_of
from jobs.core.pipeline import LoadedPipeline
from jobs.core.sources import shown
from jobs.core.strict_yaml import CONFIG_MAP_BYTES
from jobs.data.encoded import check_suits
from jobs.evaluation import gate
from jobs.tools import overlay
from jobs.tools.advice import advice
from jobs.tools.overlay import Files

log = logging.getLogger("jobs")


def run(path: Path) -> None:
    """Check the overlay, or the adapter whose folder is named.

    Raises:
        UserError: with every problem that was found, a line each.
    """
    files = overlay.find(path)
    environment, adapters, problems = overlay.read(files)

    if not files.environment.exists() and not files.adapter:
        raise UserError("\n".join(problems))  # an overlay of the earlier form: nothing else can be told before that

    def collect(check: Callable[..., object], *arguments: object) -> None:
        try:
            check(*arguments)
        except UserError as error:
            problems.extend(str(error).splitlines())

    if environment:
        collect(check_architecture, environment, adapters.values())
    for loaded in adapters.values():
        of_data = loaded.evaluated_here() if isinstance(loaded, LoadedImport) else loaded
        if of_data:
            collect(check_data, of_data)
        collect(check_size, loaded)
    if not files.adapter:
        collect(check_served_size, files)
        if environment and environment.environment.serving.mode == "merged" and len(files.pipelines) > 1:
            log.warning("%s: serving.mode is merged, so the server runs one adapter, the first by name that passed its "
                        "gate; %d more are trained and not served. Give each an environment of its own",
                        environment.path, len(files.pipelines) - 1)
    collect(check_kustomization, files, environment, adapters)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    log.info("%s: valid", files.pipelines[0].parent if files.adapter else files.folder)


def check_data(loaded: LoadedPipeline) -> None:
    """The data that lies beside the pipeline file: pinned content, and records that a relocation would take. Logs
    advice on training."""
    from jobs.data import split
    from jobs.data.formats import files_in

    for name, source in data_in_git(loaded).items():
        require_pin(loaded, name, source)
    source, statistics, holdout = loaded.pipeline.dataset, None, []
    if source.scheme == "file":
        with TemporaryDirectory(prefix="check-") as folder:
            statistics = split.split(files_in(loaded.resolve(source)), source.holdout, Path(folder), source.validation)
            holdout = [json.loads(line) for line in (Path(folder) / f"{split.HOLDOUT}.jsonl").open(encoding="utf-8")]
        check_records(loaded, statistics)
    check_tasks(loaded)
    check_search(loaded, statistics)
    check_privacy(loaded, statistics)
    if holdout:
        check_evidence(loaded, holdout)
    if isinstance(loaded.pipeline, EvaluatedImport):
        return
    of_trials = (advice(loaded.pipeline.model_copy(update={"training": trial}), statistics)
                 for trial in loaded.pipeline.training.trials())
    for line in dict.fromkeys(itertools.chain.from_iterable(of_trials)):
        log.info("%s: advice: %s", loaded.path, line)


def check_evidence(loaded: LoadedPipeline, holdout: Sequence[Mapping[str, Any]]) -> None:
    """The held-out records can decide the rules of the gate; what difference they can show is said."""
    evaluation = loaded.pipeline.evaluation
    try:
        gate.check_measurable(evaluation, holdout)
    except UserError as error:
        raise UserError(f"{loaded.path}: {error}") from None
    clusters = len(set(gate.clusters_of(holdout, evaluation.clusters)))
    gain = gate.detectable_gain(clusters, evaluation.confidence)
    log.info("%s: evaluation: %d held-out records in %d clusters. With %g %% confidence they show, in 4 of 5 cases, a "
             "true gain of %.2g in a score from 0 to 1, if gains vary by %g (standard deviation)", loaded.path,
             len(holdout), clusters, evaluation.confidence * 100, gain, gate.SPREAD_OF_GAINS)
    for key, rule in evaluation.rules():
        if metric_of(key).population == "records" and rule.max_drop is not None and rule.max_drop < gain:
            log.info("%s: advice: evaluation.gate.%s.max_drop: %g is nearer than %.2g, so that an adapter that is as "
                     "good as the %s model may be undecided. Bring more held-out records", loaded.path, key,
                     rule.max_drop, gain, rule.than)
        if score_of(key).per_token and rule.than == "reference":
            log.info("%s: advice: evaluation.gate.%s: models are compared by it only if their tokenizers are the same; "
                     "bits_per_byte compares the reference model in any case", loaded.path, key)


def check_records(loaded: LoadedPipeline, statistics: Mapping[str, Any]) -> None:
    """The records are of one kind, and suit the settings of the training; `statistics` are those of the split."""
    shapes = statistics["shapes"]
    preferences, others = shapes.get("preference", 0), sum(shapes.values()) - shapes.get("preference", 0)
    if preferences and others:
        raise UserError(f"{loaded.path}: dataset: {preferences} records are preferences (`chosen` and `rejected`), and "
                        f"{others} are not: training learns from one kind or the other. Bring them as two datasets")
    try:
        check_suits(loaded.pipeline.training, preferences=bool(preferences),
                    validation=bool(statistics["records"].get("validation")))
    except UserError as error:
        raise UserError(f"{loaded.path}: {error}") from None


def check_tasks(loaded: LoadedPipeline) -> None:
    """The tasks' patterns and schemas compile; the records beside the pipeline file are valid, enough for their rules,
    and not among those that are trained on."""
    from jobs.data import harness, split, tasks
    from jobs.data.formats import files_in

    pipeline, here = loaded.pipeline, {}
    for task in pipeline.evaluation.tasks:
        tasks.check_options(task)
        task_file = None
        if task.lm_eval and task.lm_eval.scheme == "file":
            file = loaded.resolve(task.lm_eval)
            task_file = harness.read(file, str(file), task.lm_eval.metric)
        if task.scheme == "file" and (task_file or not task.lm_eval):
            here[task.name] = task, tasks.convert(task, files_in(loaded.resolve(task)), None, task_file)
    tasks.require_evidence(pipeline.evaluation, ((task, [each.record for each in placed])
                                                 for task, placed in here.values()))
    if here and pipeline.dataset.scheme == "file":
        with TemporaryDirectory() as folder:
            split.split(files_in(loaded.resolve(pipeline.dataset)), pipeline.dataset.holdout, Path(folder),
                        pipeline.dataset.validation)
            tasks.require_unseen(itertools.chain.from_iterable(placed for _, placed in here.values()), Path(folder))


def check_search(loaded: LoadedPipeline, statistics: Mapping[str, Any] | None) -> None:
    """What a search costs, and where the data is not here to look, what it needs.

    Args:
        statistics: those of the split; None where the data is not here to look.
    """
    training, dataset = loaded.pipeline.training, loaded.pipeline.dataset
    if training.search is None:
        return
    log.info("%s: training.search: %s", loaded.path, training.search.summary(training.epochs))
    if not statistics and not dataset.validation:
        log.warning("%s: training.search chooses by the loss on the validation split, and dataset.validation is 0: "
                    "some records of %s must have `\"split\": \"validation\"`", loaded.path, shown(dataset.source))


def check_privacy(loaded: LoadedPipeline, statistics: Mapping[str, Any] | None) -> None:
    """There are records enough for the canaries and for the rules on privacy.

    Args:
        statistics: those of the split; None where the data is not here to look.
    """
    from jobs.data.canaries import check_fits
    from jobs.evaluation.privacy import check_held_out

    evaluation = loaded.pipeline.evaluation
    if evaluation.privacy is None or statistics is None:
        return
    try:
        check_fits(evaluation.privacy.canaries, evaluation.privacy.repetitions, statistics["records"]["train"])
        check_held_out(evaluation, statistics["records"]["holdout"])
    except UserError as error:
        raise UserError(f"{loaded.path}: {error}") from None


def data_in_git(loaded: LoadedAdapter) -> dict[str, Source]:
    """The data that lies beside the pipeline file, by key: records, and sentences with judgements."""
    return {name: source for name, source in loaded.pipeline.sources().items() if source.scheme == "file"}


def require_pin(loaded: Loaded, name: str, source: Source) -> None:
    """The `file:` source at key `name` must exist and match its pin."""
    from jobs.relocation.sources import file

    path = loaded.resolve(source)
    if not path.exists():
        raise UserError(f"{loaded.path}: {name}: {path} does not exist")
    found = file.path_sha256(path)
    if found != source.sha256:
        raise UserError(f"{path}: has sha256 {found}, but {loaded.path} pins {name} at {source.sha256}. If the change "
                        f"is meant, run: python -m jobs pin {loaded.path.parent}")


def check_architecture(environment: LoadedEnvironment, adapters: Collection[LoadedAdapter]) -> None:
    """vLLM can serve adapters of the base model in the desired mode, by the architecture in its file or folder."""
    from jobs.relocation import embedded

    base, mode = environment.environment.base_model, environment.environment.serving.mode
    where = f"{environment.path}: base_model"
    if base.scheme == "builtin":
        architecture: str | None = embedded.ARCHITECTURE
    elif base.scheme == "file" and environment.resolve(base).is_dir():
        architecture = models.architecture(environment.resolve(base))
    else:
        architecture = base.architecture
    if architecture is None:
        log.warning("%s: its architecture is not recorded, so `check` cannot tell whether vLLM can serve it; "
                    "relocation does. Record it with: python -m jobs pin %s --update", where, environment.path.parent)
        return
    models.check_servable(architecture, where, mode)
    problems = []
    for loaded in (each for each in adapters if isinstance(each, LoadedPipeline)):
        try:
            for trial in loaded.pipeline.training.trials():
                models.check_target_modules(architecture, trial.lora.target_modules, str(loaded.path), mode)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def check_size(loaded: LoadedAdapter) -> None:
    """Pipeline file and data in git fit into the ConfigMap that carries them into the cluster."""
    total = _size([loaded.path, *(loaded.resolve(source) for source in data_in_git(loaded).values())])
    if total > CONFIG_MAP_BYTES:
        raise UserError(f"{loaded.path}: the pipeline file and the data beside it have {total} bytes in total, and "
                        f"a ConfigMap holds {CONFIG_MAP_BYTES}. Put the data where a URL reaches it (https://, s3://, hf://)")


def check_served_size(files: Files) -> None:
    """The environment file and all pipeline files fit into the ConfigMap that serving mounts."""
    total = _size([files.environment, *files.pipelines])
    if total > CONFIG_MAP_BYTES:
        raise UserError(f"{files.folder}: {files.environment.name} and the {len(files.pipelines)} pipeline files have "
                        f"{total} bytes in total, and the ConfigMap `serving-pipelines` holds {CONFIG_MAP_BYTES}. "
                        "Shorten their comments, or make a second environment")


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())


def check_kustomization(files: Files, environment: LoadedEnvironment | None,
                        adapters: Mapping[str, LoadedAdapter]) -> None:
    """Folders, names and entries agree; the overlay renders, and an edit of its files does what it should."""
    from jobs.tools import entries, kustomization

    found = list(entries.problems(files.folder, adapters))
    problems = [strict_yaml.one_line(problem.message) for problem in found if files.adapter in (None, problem.adapter)]
    wrong = {problem.adapter for problem in found if problem.adapter}
    try:
        if files.adapter not in wrong:
            shared = None if files.adapter else environment
            kustomization.check(files.folder, shared, adapters, only=files.adapter, without=wrong)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
