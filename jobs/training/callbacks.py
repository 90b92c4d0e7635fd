"""What happens beside the steps of a training: checkpoints that are whole, a stop that saves first, progress."""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core import artifacts, signatures
from jobs.core.errors import UserError
from jobs.core.files import read_plain_file, sha256_of, write_atomically
from jobs.core.layout import CHECKPOINTS, SIGNATURE_BYTES
from jobs.core.pipeline import Training
from jobs.core.progress import Progress
from jobs.core.signing import Signer
from jobs.training.distributed import Team
from jobs.training.packing import Batches
from jobs.training.trainer import HeldOut

if TYPE_CHECKING:
    from transformers import TrainerState

log = logging.getLogger("jobs")

MAX_LINES = 20  # of records, that an error names
ADAPTER = "adapter_model.safetensors"  # as PEFT names it
CHECKPOINT_MARKER = "complete.json"  # a checkpoint without it was interrupted while being written
CHECKPOINT_SIGNATURE = f"{CHECKPOINT_MARKER}.sig"


@dataclass(frozen=True)
class Folders:
    """Where training writes while it runs; both outlive the pod, neither is part of the artifact."""

    checkpoints: Path
    tensorboard: Path


class NotFinite(UserError):
    """A loss or a gradient that is not finite."""


def newest_checkpoint(folder: Path, signer: Signer | None = None) -> str | None:
    """The newest whole checkpoint in `folder`; those that a kill left incomplete or damaged are removed.

    Args:
        signer: where artifacts are signed, checkpoints are, too: what a training resumes from becomes a part of what it
            signs. One that is not signed by a trusted key is removed.
    """
    steps = {int(p.name.rpartition("-")[2]): p for p in folder.glob("checkpoint-*")}
    for step in sorted(steps, reverse=True):
        marker = steps[step] / CHECKPOINT_MARKER
        if marker.is_file() and json.loads(marker.read_text()) == _checkpoint_listing(steps[step]) and (
                signer is None or is_signed(steps[step], signer)):
            log.info("resuming from the checkpoint at step %d", step)
            return str(steps[step])
        log.info("the checkpoint at step %d is incomplete%s: removed", step, " or not signed" if signer else "")
        shutil.rmtree(steps[step])
    return None


def mark_whole(checkpoint: Path, signer: Signer | None = None) -> None:
    """Let a training resume from a checkpoint that is written."""
    if signer:
        write_atomically(checkpoint / CHECKPOINT_SIGNATURE, signer.sign(_signed_content(checkpoint), CHECKPOINT_MARKER))
    write_atomically(checkpoint / CHECKPOINT_MARKER, json.dumps(_checkpoint_listing(checkpoint)))


def _checkpoint_listing(checkpoint: Path) -> list[dict[str, Any]]:
    return [file for file in artifacts.listing(checkpoint)
            if file["path"] not in (CHECKPOINT_MARKER, CHECKPOINT_SIGNATURE)]


def _signed_content(checkpoint: Path, best: Path | None = None) -> bytes:
    """What the signature of a checkpoint is made over: its files, with the best weights beside it, and its place, which
    names the adapter: the checkpoint of another adapter is none of this one's.

    Args:
        best: the best weights, where they were copied to; by default where they are beside the checkpoint.
    """
    best = best or best_weights(checkpoint.parent, read_state(str(checkpoint)))
    place = checkpoint.parts[max(at for at, part in enumerate(checkpoint.parts) if part == CHECKPOINTS):]
    return artifacts.canonical({"checkpoint": list(place), "files": _checkpoint_listing(checkpoint),
                                "best": sha256_of(best) if best.exists() else None})


def is_signed(checkpoint: Path, signer: Signer, best: Path | None = None) -> bool:
    """Whether a trusted key signed this checkpoint, with its best weights (`best`: where they were copied to)."""
    try:
        signature = read_plain_file(checkpoint / CHECKPOINT_SIGNATURE, SIGNATURE_BYTES)
        signatures.verify(_signed_content(checkpoint, best), signature, signer.keys)
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return False
    return True


def finished(state: TrainerState, until: int, patience: int | None, measured: HeldOut) -> bool:
    """Whether training is over: at step `until`, or after `patience` evaluations that were no better than the best."""
    since = sum("eval_loss" in entry and entry["step"] in measured.steps and
                entry["step"] > (state.best_global_step or 0) for entry in state.log_history)
    return state.global_step >= until or (patience is not None and since >= patience)


def read_state(checkpoint: str) -> TrainerState:
    """Where the training was at a checkpoint."""
    from transformers import TrainerState
    from transformers.trainer import TRAINER_STATE_NAME

    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def best_weights(checkpoints: Path, state: TrainerState) -> Path:
    """The adapter's weights with the lowest validation loss so far, with `keep: best`."""
    return checkpoints / f"best-{state.best_global_step}.safetensors"


def trainer_callbacks(stop: threading.Event, team: Team, folders: Folders, batches: Batches, measured: HeldOut,
                      training: Training, until: int, signer: Signer | None = None) -> list[Any]:
    """Trainer callbacks: in every process whole checkpoints, evaluations, and ends that save first, or that save
    nothing; in the main one progress lines and TensorBoard's scalars. `signer` signs the checkpoints."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers import TrainerCallback, TrainerControl, TrainingArguments

    steps, tokens_per_step = len(batches), batches.tokens / len(batches)

    class Save(TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                        **_: Any) -> TrainerControl:
            looks = state.global_step in measured.steps or state.global_step == until
            control.should_evaluate = looks and len(measured.records) > 0
            if state.global_step == until:
                control.should_save = control.should_training_stop = True
            elif team.any(stop.is_set()):  # all of them stop after the same step, whichever got the signal
                log.info("SIGTERM: saving a checkpoint at step %d", state.global_step)
                control.should_save = control.should_training_stop = True
            if training.keep == "best" and control.should_evaluate:
                control.should_save = True
            return control

        def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, float],
                   **__: Any) -> None:
            """Before the step's checkpoint would be saved."""
            wrong = [name for name in ("loss", "grad_norm", "eval_loss") if not math.isfinite(logs.get(name, 0.0))]
            if wrong:
                raise NotFinite(_not_finite(wrong[0], state.global_step, batches, measured, training))

        def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                    **_: Any) -> TrainerControl:
            team.barrier()  # each process has a file of its own in it
            if team.main:
                checkpoint = folders.checkpoints / f"checkpoint-{state.global_step}"
                # Before the marker: every whole checkpoint has its best weights beside it.
                if training.keep == "best" and state.best_global_step == state.global_step:
                    shutil.copyfile(checkpoint / ADAPTER, best_weights(folders.checkpoints, state))
                mark_whole(checkpoint, signer)
                if training.keep == "best":
                    _remove_unneeded(folders.checkpoints)
            if not control.should_training_stop and finished(state, until, training.patience, measured):
                log.info("step %d/%d: no lower validation loss in %d evaluations, training ends", state.global_step,
                         steps, training.patience)
                control.should_training_stop = True
            return control

    class Watch(TrainerCallback):
        def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
            # purge_step hides what an interrupted attempt logged after the checkpoint that this one resumes from.
            self.writer = SummaryWriter(str(folders.tensorboard), purge_step=state.global_step + 1)
            self.progress = Progress("training steps", steps)
            self.progress.skip(state.global_step)

        def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, float],
                   **__: Any) -> None:
            step = state.global_step
            if "eval_loss" in logs:
                self.writer.add_scalar(f"loss/{measured.name.removesuffix('_loss')}", logs["eval_loss"], step)
                log.info("step %d/%d  %s %.4f", step, steps, measured.name.replace("_", " "), logs["eval_loss"])
            if "loss" in logs:
                self.writer.add_scalar("loss/train", logs["loss"], step)
                self.writer.add_scalar("learning_rate", logs["learning_rate"], step)
                self.progress.add(step - self.progress.done, lambda: f"loss {logs['loss']:.4f}, "
                                  f"{tokens_per_step * self.progress.rate:.0f} tokens/s")
                self.writer.add_scalar("tokens_per_second", tokens_per_step * self.progress.rate, step)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.writer.close()

    return [Save(), Watch()] if team.main else [Save()]


def _remove_unneeded(checkpoints: Path) -> None:
    """Remove the weights that were the best ones, but are so in no checkpoint any more."""
    needed = {best_weights(checkpoints, read_state(str(folder))) for folder in checkpoints.glob("checkpoint-*")
              if (folder / CHECKPOINT_MARKER).is_file()}
    for file in set(checkpoints.glob("best-*.safetensors")) - needed:
        file.unlink()


def _not_finite(name: str, step: int, batches: Batches, measured: HeldOut, training: Training) -> str:
    names = {"loss": "the loss", "grad_norm": "the gradient", "eval_loss": f"the {measured.name.replace('_', ' ')}"}
    where = f"step {step} of {len(batches)}: {names[name]} is not finite. Nothing was published"
    advice = f"lower training.learning_rate ({training.learning_rate:g})"
    if name == "eval_loss":
        return f"{where}; {advice}"
    lines = batches.lines(step)
    shown = ", ".join(map(str, lines[:MAX_LINES]))
    if len(lines) > MAX_LINES:
        shown += f" and {len(lines) - MAX_LINES} more"
    return f"{where}; {advice}, or look at the step's records: lines {shown} of train.jsonl in the dataset's artifact"


def history_entry(raw: dict[str, float], held_out: str, epochs: float) -> dict[str, float] | None:
    """One entry of Trainer's log as one of ours; None for its summary, whose timings differ from run to run.

    Args:
        held_out: the name of the loss of what is held out.
        epochs: how many epochs are one to Trainer.
    """
    at = {"step": raw["step"], "epoch": round(raw["epoch"] * epochs, 4)}
    if "loss" in raw:
        return at | {"loss": raw["loss"], "learning_rate": raw["learning_rate"]}
    return at | {held_out: raw["eval_loss"]} if "eval_loss" in raw else None
