"""The training job: a LoRA adapter for the base model, from the dataset's train split.

    python -m jobs --pipeline overlays/kind/pipeline.yaml --volumes /volumes train

Waits for dataset, base model and tokenizer; refuses what vLLM could not serve; encodes and packs the records; trains
with transformers' Trainer and PEFT; publishes adapter, model card and loss history as one artifact; and where
`serving.mode` asks for it, the merged model as another. A kill costs the steps since the last checkpoint, never the
result: the next attempt resumes and ends with the same weights. With several GPUs or nodes it is several processes
(distributed.py), of which the main one publishes and reports.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core import artifacts, models
from jobs.core.errors import Terminated, UserError
from jobs.core.files import write_atomically
from jobs.core.layout import CHECKPOINTS, TENSORBOARD
from jobs.core.pipeline import Lora, Pipeline, Training
from jobs.core.plan import FINE_TUNED_VOLUME, Plan, plan
from jobs.core.progress import Progress
from jobs.data.encoding import Encoded, encode
from jobs.training import distributed, merge
from jobs.training.distributed import Team

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jobs.core.pipeline import Loaded

log = logging.getLogger("jobs")

CHECKPOINT_MARKER = "complete.json"  # a checkpoint without it was interrupted while being written
LESS_MEMORY = ("Lower training.tokens_per_batch, or set gradient_checkpointing: true, quantization: 4bit or, with "
               "several GPUs, sharding: fsdp")
Pack = list[Encoded]


@dataclass(frozen=True)
class Folders:
    """Where training writes while it runs; both outlive the pod, neither is part of the artifact."""

    checkpoints: Path
    tensorboard: Path


@dataclass(frozen=True)
class Splits:
    """The encoded records, and how many were left out because they are longer than `max_length`."""

    train: list[Encoded]
    holdout: list[Encoded]
    too_long: int


def run(loaded: Loaded, volumes: Path, wait_seconds: float) -> None:
    """Train the adapter that the pipeline asks for, and merge it where it is to be served so, unless that is done.

    Raises:
        UserError: the data or the settings cannot give an adapter that vLLM serves.
        RetryableError: an input did not appear in time.
        Terminated: SIGTERM; a checkpoint is saved.
    """
    pipeline = loaded.pipeline
    wanted = plan(pipeline)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    if distributed.is_worker():
        if not distributed.is_main():
            log.setLevel(logging.WARNING)
        publish_adapter(pipeline, wanted, volumes, wait_seconds)
    elif not artifacts.done(wanted.adapter, volumes):
        artifacts.wait_until_there([wanted.dataset, wanted.base_model, wanted.tokenizer], volumes, wait_seconds)
        models.check_gpu()
        launch = distributed.launch_wanted()
        if launch is None:
            # With more GPUs in sight Trainer would divide what it takes for a batch of rows, and is one of tokens.
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
            publish_adapter(pipeline, wanted, volumes, wait_seconds)
        else:
            distributed.launch(launch, ["--pipeline", str(loaded.path), "--volumes", str(volumes),
                                        "--wait-seconds", str(wait_seconds), "train"], wait_seconds)
    if not distributed.is_main():
        return
    if pipeline.serving.mode == "merged" and not artifacts.done(wanted.merged_model, volumes):
        merge.publish(pipeline, wanted, volumes, wait_seconds)


def publish_adapter(pipeline: Pipeline, wanted: Plan, volumes: Path, wait_seconds: float) -> None:
    """Wait for the inputs, refuse what could not be served, train the adapter and publish it."""
    dataset, base_model, tokenizer_files = artifacts.wait(
        [wanted.dataset, wanted.base_model, wanted.tokenizer], volumes, wait_seconds)
    target_modules = models.check_target_modules(models.architecture(base_model.path),
                                                 pipeline.training.lora.target_modules, str(base_model.path),
                                                 pipeline.serving.mode)
    if pipeline.serving.mode == "merged":
        merge.stored_dtype(base_model.path)  # better refused now than after hours of training
    check_length(models.read_config(base_model.path), pipeline.training)

    own = Folders(volumes / FINE_TUNED_VOLUME / CHECKPOINTS / wanted.adapter.digest,
                  volumes / FINE_TUNED_VOLUME / TENSORBOARD / pipeline.adapter / wanted.adapter.digest / "train")

    team = Team(wait_seconds)
    asked = False

    def together(draft: Path) -> tuple[Splits, list[dict[str, float]]]:
        log.info("training %s on %s: loading model and data", wanted.adapter, pipeline.base_model.name)
        tokenizer = models.load_tokenizer(tokenizer_files.path)
        model = models.load_model(base_model.path, four_bits=pipeline.training.quantization == "4bit",
                                  stay_on_cpu=pipeline.training.sharding == "fsdp" and team.size > 1)
        models.check_vocabulary(model, tokenizer, str(tokenizer_files.path))
        splits = encode_splits(dataset.path, tokenizer, pipeline.training.max_length)
        return splits, train(model, splits, pipeline.training, target_modules, own, draft, team)

    def write(draft: Path) -> dict[str, Any]:
        nonlocal asked
        asked = team.told(True)
        with models.gpu_memory(LESS_MEMORY):
            splits, history = together(draft)
        finish_adapter(draft, pipeline, splits, history, target_modules, dataset.digest)
        return {"base_model": pipeline.base_model.name, "dataset": dataset.digest}

    if team.main:
        adapter = artifacts.publish(wanted.adapter, volumes, write, keep=pipeline.retention.keep,
                                    adapter_name=pipeline.adapter, wait_seconds=wait_seconds)
        if not asked:  # another job had it by the time
            team.told(False)
        shutil.rmtree(own.checkpoints, ignore_errors=True)
        log.info("trained: %s", adapter.path)
    elif team.told():
        with models.gpu_memory(LESS_MEMORY):
            together(own.checkpoints)  # the main process saves and publishes
    team.leave()


def check_length(config: dict[str, Any], training: Training) -> None:
    """Refuse a `max_length` beyond the positions that the model was made for."""
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(positions, int) and training.max_length > positions:
        raise UserError(f"training.max_length is {training.max_length}, but the base model knows only {positions} "
                        "positions; lower it")


def encode_splits(dataset: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Splits:
    """Encode the dataset artifact's two splits; records of more than `max_length` tokens are left out and counted.

    Cutting them would teach the model to stop in the middle of an answer.

    Raises:
        UserError: when a split has no record that fits.
    """
    fitting: dict[str, list[Encoded]] = {}
    too_long = 0
    for name in ("train", "holdout"):
        with (dataset / f"{name}.jsonl").open(encoding="utf-8") as lines:
            encoded = [encode(tokenizer, json.loads(line)) for line in lines]
        fitting[name] = [record for record in encoded if len(record) <= max_length]
        if not fitting[name]:
            raise UserError(f"all {len(encoded)} {name} records are longer than training.max_length ({max_length} "
                            f"tokens; the shortest has {min(map(len, encoded), default=0)}). Raise it, or shorten them")
        too_long += len(encoded) - len(fitting[name])
    if too_long:
        log.warning("%d records are longer than training.max_length (%d tokens) and are left out", too_long, max_length)
    return Splits(fitting["train"], fitting["holdout"], too_long)


def pack(records: Sequence[Encoded], tokens_per_batch: int, seed: int) -> list[Pack]:
    """Shuffle the records and fill batches of at most `tokens_per_batch` tokens with whole records."""
    order = list(records)
    random.Random(seed).shuffle(order)
    packs: list[Pack] = []
    room = 0
    for record in order:
        if len(record) > room:
            packs.append([])
            room = tokens_per_batch
        packs[-1].append(record)
        room -= len(record)
    return packs


def flatten(packs: Sequence[Pack]) -> dict[str, Tensor]:
    """One pack as a padding-free batch of shape [1, tokens].

    Positions restart at each record, by which the model keeps records from attending to each other; labels are -100
    on prompts and on each record's first token, so only completions are learned.
    """
    from transformers import DataCollatorWithFlattening

    features = [{"input_ids": record.prompt + record.completion,
                 "labels": [-100] * len(record.prompt) + record.completion} for (only,) in [packs] for record in only]
    batch: dict[str, Tensor] = DataCollatorWithFlattening()(features, return_tensors="pt")
    return batch


def train(model: PreTrainedModel, splits: Splits, training: Training, target_modules: list[str], folders: Folders,
          output: Path, team: Team | None = None) -> list[dict[str, float]]:
    """Train a LoRA adapter on `model` and save it in `output`, resuming from the newest whole checkpoint.

    Args:
        team: the processes that train together; each is called with the same arguments, and the main one saves.
    Returns:
        the loss history: {"step", "epoch", "loss", "learning_rate"} for each step and
        {"step", "epoch", "holdout_loss"} about ten times in all.
    Raises:
        Terminated: after SIGTERM to any of the processes, with a checkpoint saved.
    """
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import TrainingArguments, set_seed
    from transformers.pytorch_utils import Conv1D
    from transformers.trainer_callback import PrinterCallback

    team = team or Team()
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it tells each file of each checkpoint
    stop = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    packs = pack(splits.train, training.tokens_per_batch, training.seed)
    steps = len(packs) * training.epochs
    set_seed(training.seed)  # LoRA's A matrices start random
    # GPT-2 keeps its layers' weights the other way round; PEFT would find that out by itself, with a warning a layer.
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    if training.quantization == "4bit":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer does that
    adapted = get_peft_model(model, lora_config(training.lora, target_modules, transposed=transposed))
    trainable, total = adapted.get_nb_trainable_parameters()
    log.info("%d train and %d holdout records in %d batches; %d epochs, %d steps; %d of %d parameters are trained",
             len(splits.train), len(splits.holdout), len(packs), training.epochs, steps, trainable, total)
    trainer = _trainer(team)(
        model=adapted,
        args=TrainingArguments(
            output_dir=str(folders.checkpoints), num_train_epochs=training.epochs,
            per_device_train_batch_size=1, per_device_eval_batch_size=1,  # in packs
            learning_rate=training.learning_rate, lr_scheduler_type="cosine", warmup_steps=min(100, steps // 10),
            seed=training.seed, bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),  # unless told so, accelerate overlooks the others of a team on CPUs
            gradient_checkpointing=training.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},  # the other kind needs inputs with gradients
            **_sharding(training, team),
            save_strategy="steps", save_steps=training.checkpoint_steps, save_total_limit=2,
            eval_strategy="steps", eval_steps=max(1, steps // 10),
            # Each step's loss is logged by itself: a mean over several would differ after a resume in between.
            logging_steps=1, report_to="none", disable_tqdm=True, remove_unused_columns=False,
            label_names=["labels"], dataloader_pin_memory=False,
            # With a key-value cache transformers stops telling packed records apart, silently.
            use_cache=False),
        train_dataset=[distributed.share(whole, team.rank, team.size) for whole in packs],
        eval_dataset=[distributed.share(whole, team.rank, team.size)
                      for whole in pack(splits.holdout, training.tokens_per_batch, training.seed)],
        data_collator=flatten,
        callbacks=_callbacks(stop, team, folders.tensorboard, steps, sum(map(len, splits.train)) / len(packs)),
    )
    trainer.remove_callback(PrinterCallback)
    if training.sharding == "fsdp" and not trainer.is_fsdp_enabled:
        if team.size > 1:
            raise UserError("training.sharding: fsdp needs GPUs: accelerate divides a model among those only. Remove "
                            "the key, or train on GPUs")
        log.info("training.sharding: fsdp divides the model among processes; this is the only one")
    try:
        checkpoint = team.told(newest_checkpoint(folders.checkpoints) if team.main else None)
        # Otherwise a batch would be divided by one number and its gradients brought together among another.
        seen = trainer.args.world_size
        assert seen == team.size, f"Trainer sees {seen} processes, not {team.size}"
        team.barrier()  # however slowly a node read the model; from here on NCCL waits for 10 minutes at most
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if trainer.state.global_step < steps:
        raise Terminated(f"stopped by SIGTERM at step {trainer.state.global_step} of {steps}; a checkpoint is saved "
                         "and the next attempt resumes there")
    whole = _whole_adapter(trainer.model) if trainer.is_fsdp_enabled else None
    if team.main:
        adapted.save_pretrained(str(output), state_dict=whole)
    return [entry for raw in trainer.state.log_history if (entry := _history_entry(raw))]


def _trainer(team: Team) -> Any:
    """transformers' Trainer, in which the processes of a team divide each batch instead of taking different ones."""
    from transformers import Trainer

    class TeamTrainer(Trainer):
        def _get_dataloader(self, *arguments: Any, **named: Any) -> Any:
            # accelerate deals the batches out to the processes. Here each has its share of every batch, and takes them
            # all, in the same order. (transformers does the same for its BatchRebalanceSampler.)
            loader = super()._get_dataloader(*arguments, **named)
            if team.size > 1:
                loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
            return loader

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            # Sharded, Trainer would bring the whole base model together for a checkpoint; the adapter is enough.
            if not self.is_fsdp_enabled:
                super().save_model(output_dir, _internal_call)
                return
            adapter = _whole_adapter(self.model)
            if team.main:
                self._save(output_dir, state_dict=adapter)

    return TeamTrainer


def _whole_adapter(model: Any) -> dict[str, Tensor]:
    """The trained weights of a model that is divided among the processes, whole; all of them must call this."""
    return {name: getattr(weight.detach(), "full_tensor", weight.detach)().cpu()
            for name, weight in model.named_parameters() if weight.requires_grad}


def _sharding(training: Training, team: Team) -> dict[str, Any]:
    """Trainer's arguments for what several processes do with the model."""
    if team.size == 1:
        return {}
    if training.sharding == "none":
        return {"ddp_find_unused_parameters": False}
    # Each layer's weights are divided among the processes and brought together while they are needed.
    return {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}


def lora_config(lora: Lora, target_modules: list[str], *, transposed: bool) -> Any:
    """PEFT's configuration for the pipeline's `training.lora`."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout,  # type: ignore[arg-type]
                      target_modules=target_modules, bias="none", fan_in_fan_out=transposed)


def newest_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in `folder`; those that a kill left incomplete or damaged are removed."""
    steps = {int(p.name.rpartition("-")[2]): p for p in folder.glob("checkpoint-*")}
    for step in sorted(steps, reverse=True):
        marker = steps[step] / CHECKPOINT_MARKER
        if marker.is_file() and json.loads(marker.read_text()) == _checkpoint_listing(steps[step]):
            log.info("resuming from the checkpoint at step %d", step)
            return str(steps[step])
        log.info("the checkpoint at step %d is incomplete: removed", step)
        shutil.rmtree(steps[step])
    return None


def _checkpoint_listing(checkpoint: Path) -> list[dict[str, Any]]:
    return [file for file in artifacts.listing(checkpoint) if file["path"] != CHECKPOINT_MARKER]


def _callbacks(stop: threading.Event, team: Team, tensorboard: Path, steps: int, tokens_per_step: float) -> list[Any]:
    """Trainer callbacks: in every process whole checkpoints and a stop that saves first; in the main one progress
    lines and TensorBoard's scalars."""
    import torch
    from torch.utils.tensorboard import SummaryWriter
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class Save(TrainerCallback):
        def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
            if not team.main:  # other dropout masks than the main process's; a resume loads each one's own state
                torch.manual_seed(args.seed + team.rank)

        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                        **_: Any) -> TrainerControl:
            if team.any(stop.is_set()):  # all of them stop after the same step, whoever was told
                log.info("SIGTERM: saving a checkpoint at step %d", state.global_step)
                control.should_save = control.should_training_stop = True
            return control

        def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
            team.barrier()  # each process has a file of its own in it
            if team.main:
                checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
                write_atomically(checkpoint / CHECKPOINT_MARKER, json.dumps(_checkpoint_listing(checkpoint)))

    class Watch(TrainerCallback):
        def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
            # purge_step hides what an interrupted attempt logged after the checkpoint that this one resumes from.
            self.writer = SummaryWriter(str(tensorboard), purge_step=state.global_step + 1)
            self.progress = Progress("training steps", steps)
            self.progress.skip(state.global_step)

        def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, float],
                   **__: Any) -> None:
            step = state.global_step
            if "eval_loss" in logs:
                self.writer.add_scalar("loss/holdout", logs["eval_loss"], step)
                log.info("step %d/%d  held-out loss %.4f", step, steps, logs["eval_loss"])
            if "loss" in logs:
                self.writer.add_scalar("loss/train", logs["loss"], step)
                self.writer.add_scalar("learning_rate", logs["learning_rate"], step)
                self.progress.add(step - self.progress.done, lambda: f"loss {logs['loss']:.4f}, "
                                  f"{tokens_per_step * self.progress.rate:.0f} tokens/s")
                self.writer.add_scalar("tokens_per_second", tokens_per_step * self.progress.rate, step)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.writer.close()

    return [Save(), Watch()] if team.main else [Save()]


def _history_entry(raw: dict[str, float]) -> dict[str, float] | None:
    """One entry of Trainer's log as one of ours; None for its summary, whose timings differ from run to run."""
    at = {"step": raw["step"], "epoch": round(raw["epoch"], 4)}
    if "loss" in raw:
        return at | {"loss": raw["loss"], "learning_rate": raw["learning_rate"]}
    return at | {"holdout_loss": raw["eval_loss"]} if "eval_loss" in raw else None


def finish_adapter(folder: Path, pipeline: Pipeline, splits: Splits, history: list[dict[str, float]],
                   target_modules: list[str], dataset: str) -> None:
    """Make what PEFT saved reproducible to the byte and self-explaining: config, loss history, model card."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    # PEFT records the folder the base model was loaded from (a mount path) and a set in random order.
    config |= {"base_model_name_or_path": pipeline.base_model.name, "revision": pipeline.base_model.revision,
               "target_modules": target_modules}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    steps = int(max(entry["step"] for entry in history))
    (folder / "training.json").write_text(json.dumps({
        "steps": steps, "records": {"train": len(splits.train), "holdout": len(splits.holdout),
                                    "too_long": splits.too_long}, "history": history}, indent=1) + "\n")
    (folder / "README.md").write_text(model_card(pipeline, splits, history, target_modules, dataset), encoding="utf-8")


def model_card(pipeline: Pipeline, splits: Splits, history: list[dict[str, float]], target_modules: list[str],
               dataset: str) -> str:
    """The model card: what this adapter is, what it was made from, and how well it fit."""
    training, base = pipeline.training, pipeline.base_model
    last: Callable[[str], float] = lambda key: [e[key] for e in history if key in e][-1]  # noqa: E731
    rows = {"base model": f"{base.name} ({base.pin})", "dataset": f"{dataset} ({pipeline.dataset.pin})",
            "records": f"{len(splits.train)} train, {len(splits.holdout)} held out, {splits.too_long} too long",
            "LoRA": f"r {training.lora.r}, alpha {training.lora.alpha:g}, dropout {training.lora.dropout:g}",
            "target modules": ", ".join(target_modules),
            "training": f"{training.epochs} epochs, learning rate {training.learning_rate:g} (cosine), at most "
                        f"{training.tokens_per_batch} tokens a batch and {training.max_length} a record, "
                        f"seed {training.seed}",
            "loss on the train split, last step": f"{last('loss'):.4f}",
            "loss on the held-out split": f"{last('holdout_loss'):.4f}"}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (f"---\nlibrary_name: peft\nbase_model: {base.name}\ntags: [lora]\n---\n# {pipeline.adapter}\n\n"
            f"A LoRA adapter on {base.name}. What it was measured to do stands in the evaluation artifact that names "
            f"its digest.\n\n| | |\n|---|---|\n{table}\n")
