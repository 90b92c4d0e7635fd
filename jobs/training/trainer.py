"""transformers' Trainer as this training uses it: its arguments, and processes that divide each batch among them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core.pipeline import Lora, Training
from jobs.training.distributed import Team

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor
    from transformers import TrainingArguments


def training_arguments(training: Training, checkpoints: Path, steps: int, team: Team) -> TrainingArguments:
    """Trainer's arguments for the pipeline's `training`.

    Args:
        checkpoints: the folder in which checkpoints are written.
        steps: how many steps the whole training has.
    """
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(checkpoints), num_train_epochs=training.epochs,
        per_device_train_batch_size=1, per_device_eval_batch_size=1,  # in packs
        learning_rate=training.learning_rate, lr_scheduler_type="cosine", warmup_steps=min(100, steps // 10),
        seed=training.seed, bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),  # without it accelerate overlooks the other processes on CPUs
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},  # the other kind needs inputs with gradients
        **_sharding(training, team),
        save_strategy="steps", save_steps=training.checkpoint_steps, save_total_limit=2,
        eval_strategy="steps", eval_steps=max(1, steps // 10),
        # Each step's loss is logged by itself: a mean over several would differ after a resume in between.
        logging_steps=1, report_to="none", disable_tqdm=True, remove_unused_columns=False,
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


def team_trainer(team: Team) -> Any:
    """transformers' Trainer class, in which the processes of a team divide each batch instead of taking different
    ones."""
    from transformers import Trainer

    class TeamTrainer(Trainer):
        def _get_dataloader(self, *arguments: Any, **named: Any) -> Any:
            # accelerate gives each process other batches. Here each process has its share of every batch, and takes all
            # batches in the same order. (transformers does the same for its BatchRebalanceSampler.)
            loader = super()._get_dataloader(*arguments, **named)
            if team.size > 1:
                loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
            return loader

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
