"""The training job: a LoRA adapter for the base model, from the dataset's train split.

    python -m jobs --pipeline overlays/kind/adapters/seville-hotels/pipeline.yaml --volumes /volumes train

Waits for the encoded dataset, the base model and the tokenizer; rejects what vLLM could not serve; packs the records;
trains with transformers' Trainer and PEFT; publishes adapter, model card and loss history as one artifact; and in
`serving: {mode: merged}` the merged model as another. A kill costs the steps since the last checkpoint, never the
result: the next attempt resumes and ends with the same weights. With several GPUs or nodes it is several processes
(distributed.py), of which the main one publishes and reports. With `training.search` it trains several adapters, of
which the best one is published (search.py).
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core import artifacts, attention, models, provenance, signing
from jobs.core.errors import Terminated, UserError
from jobs.core.imports import fast_imports
from jobs.core.layout import CHECKPOINTS, TENSORBOARD
from jobs.core.pipeline import Pipeline, Training
from jobs.core.plan import FINE_TUNED_VOLUME, Plan, plan
from jobs.core.signing import Signer
from jobs.data import encoded
from jobs.data.encoded import Splits
from jobs.training import distributed, dropout, merge, search
from jobs.training.callbacks import (
    ADAPTER,
    Folders,
    best_weights,
    finished,
    history_entry,
    is_signed,
    newest_checkpoint,
    read_state,
    trainer_callbacks,
)
from jobs.training.card import finish_adapter
from jobs.training.distributed import Team
from jobs.training.memory import tokens_at_once
from jobs.training.objectives import for_objective
from jobs.training.packing import Batches, check_length
from jobs.training.trainer import (
    LESS_MEMORY,
    HeldOut,
    held_out,
    lora_config,
    team_trainer,
    training_arguments,
    whole_adapter,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerState

    from jobs.core.pipeline import LoadedPipeline

log = logging.getLogger("jobs")


@dataclass(frozen=True)
class Trained:
    """An adapter that was trained: on what, with which settings, and with which loss."""

    splits: Splits
    training: Training
    history: list[dict[str, float]]
    search: dict[str, Any] | None = None  # the record of the search that chose the settings


def run(loaded: LoadedPipeline, volumes: Path, wait_seconds: float) -> None:
    """Train the desired adapter, and merge it in mode merged, unless that is done.

    Raises:
        UserError: the data or the settings cannot give an adapter that vLLM serves.
        RetryableError: an input did not appear in time.
        Terminated: SIGTERM; a checkpoint is saved.
    """
    pipeline = loaded.pipeline
    wanted = plan(pipeline)
    # These raise now, instead of after hours of training.
    signer, commit = signing.signer(pipeline.environment), provenance.commit()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    if distributed.is_worker():
        if not distributed.is_main():
            log.setLevel(logging.WARNING)
        publish_adapter(pipeline, wanted, volumes, wait_seconds, signer, commit)
    elif not artifacts.done(wanted.adapter, volumes, signer):
        artifacts.wait_until_there([wanted.encoded_dataset, wanted.base_model, wanted.tokenizer], volumes, wait_seconds)
        models.check_gpu()
        launch = distributed.launch_wanted()
        if launch is None:
            # If it sees more GPUs, Trainer divides the batch by rows, but this batch is one row of tokens.
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
            publish_adapter(pipeline, wanted, volumes, wait_seconds, signer, commit)
        else:
            distributed.launch(launch, ["--pipeline", str(loaded.path), "--volumes", str(volumes),
                                        "--wait-seconds", str(wait_seconds), "train"], wait_seconds)
    if not distributed.is_main():
        return
    if pipeline.environment.serving.mode == "merged" and not artifacts.done(
            wanted.merged_model, volumes, signer):
        merge.publish(pipeline, wanted, volumes, wait_seconds, signer)


def publish_adapter(pipeline: Pipeline, wanted: Plan, volumes: Path, wait_seconds: float,
                    signer: Signer | None = None, commit: str | None = None) -> None:
    """Wait for the inputs, reject what could not be served, train the adapter and publish it."""
    encoded_dataset, base_model, tokenizer_files = artifacts.wait(
        [wanted.encoded_dataset, wanted.base_model, wanted.tokenizer], volumes, wait_seconds)

    def layers(training: Training) -> list[str]:
        return models.check_target_modules(models.architecture(base_model.path), training.lora.target_modules,
                                           str(base_model.path), pipeline.environment.serving.mode)

    for each in pipeline.training.trials():
        layers(each)
    if pipeline.environment.serving.mode == "merged":
        merge.stored_dtype(base_model.path)  # raises now, instead of after hours of training
    check_length(models.read_config(base_model.path), pipeline.training)

    inputs = {"base_model": base_model, "tokenizer": tokenizer_files, "encoded_dataset": encoded_dataset,
              # Training reads its tokens only. The evaluation will read its records.
              "dataset": artifacts.find(wanted.dataset, volumes) if signer else None}
    read = {name: artifacts.content_digest(each.manifest) for name, each in inputs.items() if each}

    runs = volumes / FINE_TUNED_VOLUME / TENSORBOARD / pipeline.adapter / wanted.adapter.digest
    own = Folders(volumes / FINE_TUNED_VOLUME / CHECKPOINTS / wanted.adapter.digest, runs / "train")
    team = Team(wait_seconds)
    started = False

    def load() -> PreTrainedModel:
        tokenizer = models.load_tokenizer(tokenizer_files.path)
        model = models.load_model(base_model.path, four_bits=pipeline.training.quantization == "4bit",
                                  stay_on_cpu=pipeline.training.sharding == "fsdp" and team.size > 1)
        models.check_vocabulary(model, tokenizer, str(tokenizer_files.path))
        return model

    def train_adapter(output: Path) -> Trained:
        """What every process of the team does."""
        log.info("training %s on %s: loading model and data", wanted.adapter, pipeline.environment.base_model.name)
        training = pipeline.training
        splits = for_objective(encoded.read(encoded_dataset.path), training)
        if training.search is None:
            return Trained(splits, training, train(load(), splits, training, layers(training), own, output, team,
                                                     signer=signer))
        base = search.SharedModel(load, once=training.sharding == "none" or team.size == 1)

        def train_trial(number: int, settings: Training, until: int | None) -> list[dict[str, float]]:
            folders = Folders(*(search.trial_folder(folder, number) for folder in (own.checkpoints, runs)))
            with base.lent() as model:
                return train(model, splits, settings, layers(settings), folders, output, team, until, signer)

        return Trained(splits, *search.run(training, splits, train_trial, own.checkpoints, runs, team))

    def write(draft: Path) -> dict[str, Any]:
        nonlocal started
        started = team.broadcast(True)
        with models.gpu_memory(f"Set {LESS_MEMORY}"):
            done = train_adapter(draft)
        finish_adapter(draft, pipeline.model_copy(update={"training": done.training}), done.splits, done.history,
                       layers(done.training), wanted.dataset.digest, done.search)
        return {"base_model": pipeline.environment.base_model.name, "dataset": wanted.dataset.digest,
                **({"commit": commit} if commit else {}), **({artifacts.READ: read} if signer else {})}

    if team.main:
        adapter = artifacts.publish(wanted.adapter, volumes, write, keep=pipeline.environment.retention.keep,
                                    adapter_name=pipeline.adapter, wait_seconds=wait_seconds, signer=signer)
        if not started:  # another job published it in the meantime: the other processes need not train
            team.broadcast(False)
        shutil.rmtree(own.checkpoints, ignore_errors=True)
        log.info("trained: %s", adapter.path)
    elif team.broadcast():
        with models.gpu_memory(f"Set {LESS_MEMORY}"):
            train_adapter(own.checkpoints)  # writes nothing there: the main process saves and publishes
    team.leave()


def train(model: PreTrainedModel, splits: Splits, training: Training, target_modules: list[str], folders: Folders,
          output: Path, team: Team | None = None, until: int | None = None,
          signer: Signer | None = None) -> list[dict[str, float]]:
    """Train a LoRA adapter on `model` and save it in `output`, resuming from the newest whole checkpoint.

    Args:
        team: the processes that train together; each is called with the same arguments, and the main one saves.
        until: stop after this step of the whole training, with a checkpoint saved there and no adapter. The next call
            continues.
        signer: signs the checkpoints. It resumes only from those that a trusted key signed.
    Returns:
        the loss history: {"step", "epoch", "loss", "learning_rate"} for each step and {"step", "epoch",
        "validation_loss"}, or "holdout_loss" where the dataset has no validation split, about ten times in all and
        at `until`.
    Raises:
        UserError: the model is to be divided among processes that have no GPUs; a loss or a gradient is not finite; a
            GPU has too little memory.
        Terminated: after SIGTERM to any of the processes, with a checkpoint saved.
    """
    from transformers.trainer_callback import PrinterCallback

    team = team or Team()
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it logs each file of each checkpoint
    best = training.keep == "best"
    assert not best or len(splits.validation), "encoded.check_suits rejects it"
    batches = Batches(splits.train, training)
    steps = len(batches)
    end = min(until or steps, steps)
    measured = held_out(splits, batches)
    attention.attend_by_record(model)
    adapted = add_adapter(model, training, target_modules)
    masks = dropout.replace(adapted, training.lora.dropout, training.seed)
    tokens = team.broadcast(tokens_at_once(adapted, training, team.size))
    trainable, total = adapted.get_nb_trainable_parameters()
    log.info("%d train, %d validation and %d holdout records; %d epochs, %d steps in micro-batches of %d tokens; %d of "
             "%d parameters are trained", len(splits.train), len(splits.validation), len(splits.holdout),
             training.epochs, steps, tokens, trainable, total)
    with _event_at_sigterm() as stop:
        trainer = team_trainer(team, training, batches, measured, masks, tokens)(
            model=adapted,
            args=training_arguments(training, folders.checkpoints, steps, team),
            train_dataset=batches,
            data_collator=lambda batch: {"records": batch[0]},
            callbacks=trainer_callbacks(stop, team, folders, batches, measured, training, end, signer))
        trainer.remove_callback(PrinterCallback)
        _check_sharding(trainer, training, team)
        checkpoint = team.broadcast(newest_checkpoint(folders.checkpoints, signer) if team.main else None)
        # Otherwise a batch would be divided by one number, and its gradients summed over another.
        seen = trainer.args.world_size
        assert seen == team.size, f"Trainer sees {seen} processes, not {team.size}"
        team.barrier()  # however slowly a node read the model; from here on NCCL waits for 10 minutes at most
        state = read_state(checkpoint) if checkpoint else None
        # Without either, the last weights are needed, and Trainer loads them.
        if not (state and finished(state, end, training.patience, measured) and (best or until)):
            trainer.train(resume_from_checkpoint=checkpoint)
            state = trainer.state
    # At the end of a rung of a search, too, or it would go on with the next trial.
    if not finished(state, end, training.patience, measured) or (until and team.any(stop.is_set())):
        raise Terminated(f"stopped by SIGTERM at step {state.global_step} of {steps}; a checkpoint is saved and the "
                         "next attempt resumes there")
    if until is None:
        whole = whole_adapter(trainer.model) if trainer.is_fsdp_enabled else None
        if team.main:
            adapted.save_pretrained(str(output), state_dict=whole)
            if best:
                _take_best(folders.checkpoints, state, output / ADAPTER, signer)
    return _history(state.log_history, measured, training, end)


def _take_best(checkpoints: Path, state: TrainerState, adapter: Path, signer: Signer | None) -> None:
    """Put the weights with the lowest validation loss in place of the adapter's last ones.

    Raises:
        UserError: they are not those that were signed.
    """
    weights = best_weights(checkpoints, state)
    shutil.copyfile(weights, adapter)
    if signer and not is_signed(checkpoints / f"checkpoint-{state.global_step}", signer, adapter):
        raise UserError(f"{weights}: was changed while the training ran. Nothing was published; find out who writes to "
                        "this volume")
    log.info("kept: the weights of step %d, with the lowest validation loss", state.best_global_step)


def _history(logged: list[dict[str, float]], measured: HeldOut, training: Training,
             until: int) -> list[dict[str, float]]:
    entries = (history_entry(raw, measured.name, training.epochs) for raw in logged if raw["step"] <= until)
    return [entry for entry in entries if entry]


def add_adapter(model: PreTrainedModel, training: Training, target_modules: list[str]) -> Any:
    """The model with a new LoRA adapter on `target_modules`, as a PEFT model; `training.seed` decides its values."""
    with fast_imports():
        from peft import get_peft_model, prepare_model_for_kbit_training
        from transformers import set_seed
    from transformers.pytorch_utils import Conv1D

    set_seed(training.seed)  # LoRA's A matrices start random
    # GPT-2 keeps its layers' weights the other way round; PEFT would find that out by itself, with a warning a layer.
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    if training.quantization == "4bit":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer does that
    return get_peft_model(model, lora_config(training.lora, target_modules, transposed=transposed))


@contextmanager
def _event_at_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, instead of ending the process."""
    stop = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


def _check_sharding(trainer: Any, training: Training, team: Team) -> None:
    if training.sharding == "fsdp" and not trainer.is_fsdp_enabled:
        if team.size > 1:
            raise UserError("training.sharding: fsdp needs GPUs: accelerate divides a model among those only. Remove "
                            "the key, or train on GPUs")
        log.info("training.sharding: fsdp divides the model among processes; this is the only one")
