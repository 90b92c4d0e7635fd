"""The search for training settings: trials on one loaded base model, of which the worse ones stop early.

Successive halving: all trials train to the first rung, the best go on to the next, and so on. Each trial is a training
like any other, with its own checkpoints, and each rung is a step of it: the learning rate follows the schedule of the
whole training. So the adapter of the trial that is chosen is, to the byte, that of a training with its settings.

Trials are compared by the loss on the validation split, rounded to PRECISION digits; of equal ones the first wins. Two
machines round to the same digits unless the losses lie within float noise of a rounding boundary. So they choose the
same trial where trials differ by clearly more than that, and may choose differently among trials that are as good as
each other.

A kill costs a trial's steps since its last checkpoint: what the trials reached is in STATE, beside their checkpoints.
Optuna would store the same in a database, but its trials do not continue after a kill: they fail, and are tried again
from their first step, and its pruner decides by which trials happened to report before. Here the declaration decides
everything, and what is to be done next follows from the results that there are.

Several processes train the trials one after another, each trial on all GPUs. Trials side by side, one on each GPU,
would leave all GPUs but one idle in the last rung, which is the longest; they would be faster only where a batch is too
small to be divided.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core.errors import UserError
from jobs.core.files import write_atomically
from jobs.core.pipeline import Training
from jobs.core.search import PRECISION, Search, description, shown, text_table
from jobs.data.encoded import Splits
from jobs.training.callbacks import NotFinite
from jobs.training.distributed import Team
from jobs.training.packing import Batches
from jobs.training.trainer import held_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("jobs")

STATE = "search.json"  # in the folder of the checkpoints

History = list[dict[str, float]]
# Trains a trial, by its number, until a step, or to the end with its adapter saved; continues where it stopped.
Train = Callable[[int, Training, int | None], History]


@dataclass(frozen=True)
class Result:
    """What a trial reached at a rung. Trials and rungs are numbered from 1."""

    trial: int
    rung: int
    step: int
    loss: float | None  # on the validation split, in nats a token; None where it is not finite
    curve: list[list[float]] = field(default_factory=list)  # [step, loss] until here

    @property
    def order(self) -> tuple[float, int]:
        """Better results first."""
        return (math.inf if self.loss is None else round(self.loss, PRECISION), self.trial)


def run(training: Training, splits: Splits, train: Train, folder: Path, tensorboard: Path,
        team: Team) -> tuple[Training, History, dict[str, Any]]:
    """Choose among the trials of `training.search`, resuming what an earlier attempt began.

    Args:
        folder: where the state is kept, and the trials' checkpoints in folders `trial-N`.
        tensorboard: where the trials' runs are, in folders `trial-N`.
    Returns:
        the settings of the chosen trial, its loss history, and the record of the search for people.
    Raises:
        UserError: the loss of no trial is finite.
        Terminated: after SIGTERM, with a checkpoint saved.
    """
    search = training.search
    assert search is not None
    assert len(splits.validation), "encoded.check_suits rejects it"
    settings, names, rungs = training.trials(), [description(each) for each in search.settings()], search.rungs()
    by_epochs = {each.epochs: each for each in settings}  # of what is searched, only they change the batches
    batches = {epochs: Batches(splits.train, each) for epochs, each in by_epochs.items()}
    lengths = [len(batches[each.epochs]) for each in settings]
    state = State(folder, team)
    log.info("search: %s", search.summary(training.epochs))
    racing = list(range(1, len(settings) + 1))
    for number, rung in enumerate(rungs, 1):
        results = []
        for trial in racing:
            own, length = settings[trial - 1], lengths[trial - 1]
            result = state.find(trial, number)
            if result is None:
                step = rung.step(length)
                with _prefixed(f"trial {trial} of {len(settings)} ({names[trial - 1]})"):
                    log.info("rung %d of %d: to step %d of %d", number, len(rungs), step, length)
                    if team.main and number == 1:
                        write_settings(trial_folder(tensorboard, trial), search.settings()[trial - 1])
                    kept = held_out(splits, batches[own.epochs]).steps if own.keep == "best" else None
                    result = state.add(_train_to(step, Result(trial, number, step, None), own, train, kept))
                    log.info("step %d of %d: validation loss %s", step, length, shown(result.loss))
            results.append(result)
        best = [result.trial for result in sorted(results, key=lambda result: result.order) if result.loss is not None]
        if not best:
            raise UserError(f"training.search: at rung {number}, the loss of no trial is a finite number. Lower the "
                            "learning rates of its candidates")
        racing = sorted(best[:rungs[number].trials if number < len(rungs) else 1])
        log.info("rung %d of %d: of %d trial%s, best: %s", number, len(rungs), len(results),
                 "s" if len(results) > 1 else "", ", ".join(map(str, racing)))
        for result in results if team.main else ():
            if result.trial not in racing:
                shutil.rmtree(trial_folder(folder, result.trial), ignore_errors=True)
    [chosen] = racing
    with _prefixed(f"trial {chosen} of {len(settings)} ({names[chosen - 1]})"):
        history = train(chosen, settings[chosen - 1], None)
    record = state.record(search, training, lengths, chosen)
    log.info("\n%s", text_table(record))
    return settings[chosen - 1], history, record


def _train_to(step: int, nothing: Result, settings: Training, train: Train, kept: Collection[int] | None) -> Result:
    """The result of a trial; `nothing` if its loss is not finite.

    Args:
        kept: with `keep: best`, the steps whose weights may be kept; it counts with the lowest loss at one of them.
    """
    try:
        history = train(nothing.trial, settings, step)
    except NotFinite as error:
        log.info("%s", error)
        return nothing
    curve = [[entry["step"], entry["validation_loss"]] for entry in history if "validation_loss" in entry]
    last, loss = curve[-1]  # with `patience`, it may have ended before `step`
    if kept is not None:
        loss = min(loss for step, loss in curve if step in kept or step == last)
    return replace(nothing, step=int(last), loss=loss, curve=curve)


class State:
    """The results of the trials so far, on disk after each."""

    def __init__(self, folder: Path, team: Team) -> None:
        self._folder, self._team = folder, team
        self._results: list[Result] = [Result(**values) for values in team.broadcast(self._read() if team.main else [])]

    def find(self, trial: int, rung: int) -> Result | None:
        """The result of a trial at a rung, if it got there."""
        return next((result for result in self._results if (result.trial, result.rung) == (trial, rung)), None)

    def add(self, result: Result) -> Result:
        """Keep a result, that of the main process in all of them."""
        result = Result(**self._team.broadcast(asdict(result)))
        self._results.append(result)
        if self._team.main:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / STATE, json.dumps([asdict(each) for each in self._results]) + "\n")
        return result

    def _read(self) -> list[dict[str, Any]]:
        file = self._folder / STATE
        try:
            values: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
            return [asdict(Result(**each)) for each in values]
        except (ValueError, TypeError) as error:
            # Trials may be beyond a rung at which they are to be compared, so that their checkpoints are of no use.
            log.warning("%s: cannot be read (%s): the search starts again", file, error)
            shutil.rmtree(self._folder, ignore_errors=True)
            return []

    def record(self, search: Search, training: Training, steps: Sequence[int], chosen: int) -> dict[str, Any]:
        """What people want to know of the search: each trial's settings, losses, and why it ended."""
        rungs, trials = search.rungs(), []
        for number, (settings, length) in enumerate(zip(search.settings(), steps, strict=True), 1):
            own = [result for result in self._results if result.trial == number]
            last = own[-1]
            beside = sorted((each for each in self._results if each.rung == last.rung), key=lambda each: each.order)
            place = f"place {[each.trial for each in beside].index(number) + 1} of {len(beside)}"
            ended = ("chosen" if number == chosen else "its loss was not finite" if last.loss is None else
                     f"trained to the end: {place}" if last.rung == len(rungs) else f"stopped: {place}")
            trials.append({"trial": number, "settings": settings, "steps": length, "ended": ended,
                           "rungs": [{"step": each.step, "validation_loss": each.loss} for each in own],
                           "curve": last.curve})
        return {**search.identity(), "rungs": [{"trials": rung.trials, "share": str(rung.share)} for rung in rungs],
                "trainings": round(search.cost(training.epochs), 2), "digits_compared": PRECISION, "chosen": chosen,
                "settings": search.settings()[chosen - 1], "trials": trials}


def write_settings(run: Path, settings: Mapping[str, Any]) -> None:
    """Let TensorBoard's HParams show a trial: its settings, beside the losses that are in its run already."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    # `add_hparams` would make another run below this one for the same.
    values = {key: value if isinstance(value, int | float | str) else "+".join(value)
              for key, value in settings.items()}
    with SummaryWriter(str(run)) as writer:
        for summary in hparams(values, {"loss/validation": 0.0, "loss/train": 0.0}):
            writer.file_writer.add_summary(summary)


def trial_folder(folder: Path, trial: int) -> Path:
    """The folder of a trial below that of the whole training."""
    return folder / f"trial-{trial}"


@contextmanager
def _prefixed(prefix: str) -> Iterator[None]:
    """Put a prefix before what is logged."""
    def add(record: logging.LogRecord) -> bool:
        record.msg = f"{prefix.replace('%', '%%') if record.args else prefix}: {record.msg}"
        return True

    log.addFilter(add)
    try:
        yield
    finally:
        log.removeFilter(add)


class SharedModel:
    """The base model that all trials share: loaded once, and unchanged by each of them."""

    def __init__(self, load: Callable[[], PreTrainedModel], *, once: bool) -> None:
        """Prepare to load.

        Args:
            once: False where a training does not leave the model as it was, because it is divided among processes.
        """
        self._load, self._once = load, once
        self._model: PreTrainedModel | None = None
        self._weights: dict[str, int] = {}

    @contextmanager
    def lent(self) -> Iterator[PreTrainedModel]:
        """The base model, for one training, which adds an adapter to it."""
        if self._model is None:
            self._model = self._load()
            self._weights = fingerprints(self._model) if self._once else {}
        try:
            yield self._model
        finally:
            if self._once:
                remove_adapter(self._model)
            else:
                self._model = None
            gc.collect()  # trainer and optimizer refer to each other
        if self._once and self._weights != fingerprints(self._model):
            raise RuntimeError("a trial changed the base model that the trials share")


def remove_adapter(model: PreTrainedModel) -> None:
    """Take the LoRA layers out of a model again; its own layers are those that were there before."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):  # or PEFT warns of a second adapter
        del model.peft_config


def fingerprints(model: PreTrainedModel) -> dict[str, int]:
    """A hash of each of the model's weights."""
    import torch

    # It knows no floats of 8 bits.
    weights = ((name, weight.detach()) for name, weight in model.named_parameters())
    return {name: torch.hash_tensor(weight.view(torch.uint8) if weight.element_size() == 1 else weight)
            .view(torch.int64).item() for name, weight in weights}
