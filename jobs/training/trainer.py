"""transformers' Trainer as this training uses it: its arguments, and processes that divide each batch among them."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core.errors import UserError
from jobs.core.imports import fast_imports
from jobs.core.pipeline import Lora, Training
from jobs.data.encoded import Splits
from jobs.data.encoding import Example
from jobs.training import objectives
from jobs.training.distributed import Team
from jobs.training.dropout import Masks
from jobs.training.packing import Batches, Share, flatten, lengths_of, sample

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor
    from transformers import TrainingArguments

    from jobs.training.packing import Integers

log = logging.getLogger("jobs")

EVALUATIONS = 10  # of what is held out, in the whole training
SHARE_OF_TOKENS = 0.2  # of the training's, that all of them read at most
LESS_MEMORY = "gradient_checkpointing: true, quantization: 4bit or, with several GPUs, sharding: fsdp"


def training_arguments(training: Training, checkpoints: Path, steps: int, team: Team) -> TrainingArguments:
    """Trainer's arguments for the pipeline's `training`.

    Args:
        checkpoints: the folder in which checkpoints are written.
        steps: how many steps the whole training has.
    """
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(checkpoints),
        # To Trainer the batches of all epochs are one epoch: each has an order, and a number of batches, of its own.
        num_train_epochs=1, train_sampling_strategy="sequential", per_device_train_batch_size=1,
        learning_rate=training.learning_rate, lr_scheduler_type="cosine", warmup_steps=min(100, steps // 10),
        seed=training.seed, bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),  # without it accelerate overlooks the other processes on CPUs
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},  # the other kind needs inputs with gradients
        **_sharding(training, team),
        save_strategy="steps", save_steps=training.checkpoint_steps, save_total_limit=2,
        eval_strategy="no",  # callbacks.Save says when
        metric_for_best_model="loss" if training.keep == "best" else None, greater_is_better=False,
        # Each step's loss is logged by itself: a mean over several would differ after a resume in between. The filter
        # would log 0.0 for one that is not finite.
        logging_steps=1, logging_nan_inf_filter=False, report_to="none", disable_tqdm=True, remove_unused_columns=False,
        label_names=["labels"], dataloader_pin_memory=False,
        # With a key-value cache transformers lets packed records attend to each other, without an error.
        use_cache=False)


def _sharding(training: Training, team: Team) -> dict[str, Any]:
    """Trainer's arguments for what several processes do with the model."""
    if team.size == 1:
        return {}
    if training.sharding == "none":
        return {"ddp_find_unused_parameters": False}
    # Each layer's weights are divided among the processes, and gathered while they are needed.
    return {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}


def lora_config(lora: Lora, target_modules: list[str], *, transposed: bool) -> LoraConfig:
    """PEFT's configuration for the pipeline's `training.lora`.

    Args:
        transposed: the model keeps its layers' weights as [in, out] (GPT-2's Conv1D).
    """
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout,  # type: ignore[arg-type]
                      target_modules=target_modules, bias="none", fan_in_fan_out=transposed)


@dataclass(frozen=True)
class HeldOut:
    """What is measured beside the training, and after which steps."""

    name: str  # of its loss: validation_loss or holdout_loss
    split: Sequence[Example]
    records: Integers
    steps: frozenset[int]


def held_out(splits: Splits, batches: Batches) -> HeldOut:
    """A sample of `validation`, or of the holdout where there is no validation, EVALUATIONS times: the last at the end.

    A token that is only read costs half of one that is trained on (2 FLOPs a parameter, and 4, the weights being
    frozen). So a tenth of the training's time is a fifth of its tokens, for all evaluations together. But never less
    than a few sequences; more of them from the validation split, because it chooses among checkpoints and settings.
    """
    name, split, least = (("validation_loss", splits.validation, 256) if len(splits.validation) else
                          ("holdout_loss", splits.holdout, 16))
    chosen = sample(lengths_of(split), SHARE_OF_TOKENS * batches.tokens / EVALUATIONS, least)
    steps = {math.ceil(len(batches) * number / EVALUATIONS) for number in range(1, EVALUATIONS + 1)}
    return HeldOut(name, split, chosen, frozenset(steps))


def team_trainer(team: Team, training: Training, batches: Batches, measured: HeldOut, masks: Masks,
                 tokens: int) -> Any:
    """transformers' Trainer class, in which the processes of a team divide each batch instead of taking different
    ones, and compute their shares in micro-batches.

    A step's loss is the sum over its learned tokens (or pairs), divided by their number in all micro-batches of all
    processes. So neither number changes what is learned.

    Args:
        batches: of the training.
        measured: what `evaluate` reads.
        tokens: of a micro-batch.
    """
    with fast_imports():
        import torch
        from transformers import Trainer

    class TeamTrainer(Trainer):
        share = Share(team.rank, team.size, tokens)

        def _get_dataloader(self, *arguments: Any, **named: Any) -> Any:
            # accelerate gives each process other batches. Here each process has its share of every batch, and takes all
            # batches in the same order. (transformers does the same for its BatchRebalanceSampler.)
            loader = super()._get_dataloader(*arguments, **named)
            if team.size > 1:
                loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
            return loader

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
            while True:
                try:
                    return self._accumulate(model, inputs["records"])
                except torch.OutOfMemoryError as error:
                    self.share = self._smaller(batches.lengths[inputs["records"]].tolist(), error)
                # Nothing of the step is left, and its masks follow from its number: it is as if it had not been tried.
                model.zero_grad()
                torch.cuda.empty_cache()
                log.info("the GPU has too little memory: from here on, micro-batches have %d tokens",
                         self.share.tokens)

        def _smaller(self, lengths: list[int], error: Exception) -> Share:
            """The share in micro-batches of half the tokens."""
            largest = max(self.share.micro_batches(lengths), key=lambda one: sum(lengths[position] for position in one))
            tokens = sum(lengths[position] for position in largest)
            what = (f"the GPU has too little memory for a micro-batch of {tokens} tokens "
                    f"({str(error).partition('. ')[0]})")
            if len(largest) <= 1:
                raise UserError(f"{what}, which is one record. Lower training.max_length, or set {LESS_MEMORY}")
            if team.size > 1:  # the others wait in the middle of their step
                raise UserError(f"{what}. Set training.tokens_per_micro_batch: {tokens // 2}, or {LESS_MEMORY}")
            return replace(self.share, tokens=tokens // 2)

        def _accumulate(self, model: Any, records: Integers) -> Tensor:
            """The step's loss; its gradients are added to the model's."""
            micro_batches = list(self._micro_batches(batches.split, records))
            own = sum((objectives.counts(batch) for batch, _, _ in micro_batches), torch.zeros(2, dtype=torch.long))
            learned = self.accelerator.reduce(own.to(self.args.device), "sum").clamp(min=1)
            if training.objective == "sft":
                learned = learned[0]
            loss = torch.zeros((), device=self.args.device)
            for number, (batch, numbers, lengths) in enumerate(micro_batches, 1):
                masks.choose(self.state.global_step, numbers, lengths)
                last = number == len(micro_batches)  # after which the processes add up their gradients
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                    loss += super().training_step(model, batch, learned)
            return loss

        def _micro_batches(self, split: Sequence[Example], records: Integers
                           ) -> Iterator[tuple[dict[str, Tensor], Integers, Integers]]:
            """This process's micro-batches of some records, each with the records' numbers and lengths."""
            lengths = lengths_of(split)[records]
            for positions in self.share.micro_batches(lengths.tolist()):
                # An empty one is computed, since the others wait for it, but nothing in it is learned.
                numbers = records[positions] if positions else records[:1]
                encoded = [split[int(number)] for number in numbers]
                if not positions:
                    encoded = [encoded[0].unlearned]
                yield flatten(encoded), numbers, lengths_of(encoded)

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
                         num_items_in_batch: Any = None) -> Any:
            if training.objective == "sft":
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            losses = objectives.losses(model, self.accelerator.unwrap_model(model), inputs, training)
            return (losses / num_items_in_batch).sum() * team.size  # the processes' gradients are averaged

        def _losses(self, model: Any, batch: dict[str, Any]) -> Tensor:
            """The losses of a batch, summed: of its tokens, and of its pairs."""
            if training.objective != "sft":
                return objectives.losses(model, self.accelerator.unwrap_model(model), batch, training)
            nats = self.compute_loss(model, batch, num_items_in_batch=torch.tensor(1))
            return torch.stack([nats / team.size, nats.new_zeros(())])  # Trainer has multiplied it by that

        def evaluate(self, *_arguments: Any, **_named: Any) -> dict[str, float]:
            """The loss of what is held out. It draws no random number, so that training does not notice."""
            model = self.model_wrapped
            model.eval()
            totals = torch.zeros(2, 2, dtype=torch.float64, device=self.args.device)  # losses, and what they are of
            with torch.no_grad():
                for batch, _, _ in self._micro_batches(measured.split, measured.records):
                    totals[0] += self._losses(model, self._prepare_inputs(batch)).double()
                    totals[1] += objectives.counts(batch).to(totals.device)
            losses, of = self.accelerator.reduce(totals, "sum")
            metrics = {"eval_loss": float((losses / of.clamp(min=1)).sum())}
            self.log(metrics)
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            # What is kept must not depend on where somebody stopped the training to look: see `until` of train.
            return metrics if self.state.global_step in measured.steps else {"eval_loss": math.inf}

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            # Sharded, Trainer would gather the whole base model for a checkpoint; the adapter is enough.
            if not self.is_fsdp_enabled:
                super().save_model(output_dir, _internal_call)
                return
            adapter = whole_adapter(self.model)
            if team.main:
                self._save(output_dir, state_dict=adapter)

    return TeamTrainer


def whole_adapter(model: Any) -> dict[str, Tensor]:
    """The trained weights of a model that is divided among the processes, whole; all of them must call this."""
    return {name: getattr(weight.detach(), "full_tensor", weight.detach)().cpu()
            for name, weight in model.named_parameters() if weight.requires_grad}
