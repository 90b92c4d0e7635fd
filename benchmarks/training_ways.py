"""The ways of training that benchmarks/training.py compares: each is a process that takes one step when it is told to.

    python -m benchmarks.training_ways WAY FOLDER

The folder has a model, and `shape.json`. On standard input comes a line for each step: what the step is to take, for
ways that follow another way's batches. On standard output goes a line for each: its times, loss and batch.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from jobs.core.pipeline import Lora, Training
from jobs.data.encoding import Encoded

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@dataclass(frozen=True)
class Shape:
    """A model with random weights and the data that it is trained on."""

    name: str
    config: dict[str, Any]  # of LlamaConfig
    tokens_per_batch: int
    max_length: int
    prompt: tuple[int, int]  # tokens, at least and at most
    completion: tuple[int, int]
    dropout: float = 0.05
    steps: int = 10

    def records(self) -> list[Encoded]:
        """Records of random tokens, enough for the steps."""
        pick = random.Random(0)
        vocabulary = self.config["vocab_size"]

        def tokens(span: tuple[int, int]) -> list[int]:
            return [pick.randrange(3, vocabulary) for _ in range(pick.randint(*span))]

        made: list[Encoded] = []
        while sum(map(len, made)) < self.steps * self.tokens_per_batch:
            made.append(Encoded.of(tokens(self.prompt), tokens(self.completion)))
        return made

    def training(self) -> Training:
        """What a pipeline.yaml would say. No checkpoint is due while the benchmark runs."""
        return Training(epochs=1, learning_rate=5e-4, max_length=self.max_length,
                        tokens_per_batch=self.tokens_per_batch, checkpoint_steps=10**6,
                        lora=Lora(r=16, alpha=32, dropout=self.dropout))

    def write(self, folder: Path) -> None:
        """Make the model, and leave it with this shape in a folder."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**self.config, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
                                     pad_token_id=2)).save_pretrained(folder)
        (folder / "shape.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """The shape of a folder."""
        return cls(**json.loads((folder / "shape.json").read_text(encoding="utf-8")))


@dataclass
class Turns:
    """The process's side of the benchmark: it waits for its turn, takes a step, and reports it."""

    records: list[Encoded]
    numbers: dict[tuple[int, ...], int] = field(init=False)
    _since: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        self.numbers = {tuple(record.tokens): number for number, record in enumerate(self.records)}
        self._output = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print is no report

    def wait(self) -> dict[str, Any]:
        """Wait for the turn. Ends the process when there are no more."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        self._since = time.process_time(), time.perf_counter()
        order: dict[str, Any] = json.loads(line)
        return order

    def done(self, loss: float, batch: Sequence[int], rate: float) -> None:
        """Report a step: its loss, the numbers of its records, and its learning rate."""
        report = {"processor": time.process_time() - self._since[0], "wall": time.perf_counter() - self._since[1],
                  "loss": loss, "batch": batch, "rate": rate, "tokens": sum(len(self.records[n]) for n in batch),
                  "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        print(json.dumps(report), file=self._output, flush=True)

    def callback(self, batches: list[list[int]]) -> Any:
        """For transformers' Trainer: a turn for each step, whose batch is the next of `batches`."""
        from transformers import TrainerCallback

        turns, taken = self, 0
        rate = 0.0

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                turns.wait()

            def on_step_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
                nonlocal rate
                rate = optimizer.param_groups[0]["lr"]

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                nonlocal taken
                if "loss" in logs:
                    ends = taken + args.gradient_accumulation_steps
                    turns.done(logs["loss"], [number for batch in batches[taken:ends] for number in batch], rate)
                    taken = ends
                    turns.wait()

        return Callback()


def ours(folder: Path, shape: Shape, turns: Turns) -> None:
    """`python -m jobs train`, from the loaded data on."""
    from jobs.core import models
    from jobs.data.encoded import Splits
    from jobs.training import callbacks, packing, train

    training = shape.training()
    batches = [[int(number) for number in batch] for batch in packing.Batches(turns.records, training)]

    def trainer_callbacks(*arguments: Any, **named: Any) -> list[Any]:
        return [*callbacks.trainer_callbacks(*arguments, **named), turns.callback(batches)]

    with patch.object(train, "trainer_callbacks", trainer_callbacks):
        train.train(models.load_model(folder), Splits(turns.records, turns.records[:1], 0), training, TARGETS,
                    callbacks.Folders(folder / "checkpoints", folder / "tensorboard"), folder / "adapter")


def trl(folder: Path, shape: Shape, turns: Turns) -> None:
    """TRL's SFTTrainer with best-fit packing, which makes it padding-free; everything else by default."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    batches: list[list[int]] = []
    data = Dataset.from_dict({
        "input_ids": [list(record.tokens) for record in turns.records],
        "completion_mask": [[int(label != -100) for label in record.labels()] for record in turns.records]})
    training = shape.training()
    trainer = SFTTrainer(
        model=_adapted(_plain_model(folder), shape), train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[turns.callback(batches)],
        args=SFTConfig(str(folder / "trl"), packing=True, max_length=shape.tokens_per_batch, completion_only_loss=True,
                       per_device_train_batch_size=1, num_train_epochs=1, learning_rate=training.learning_rate,
                       lr_scheduler_type="cosine", logging_steps=1, save_strategy="no", report_to="none", bf16=False,
                       use_cpu=True, gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False,
                       seed=training.seed))
    collate = trainer.data_collator

    def watched(examples: list[dict[str, Any]]) -> Any:
        batches.append([])
        for example in examples:
            tokens = list(example["input_ids"])
            for length in example["seq_lengths"]:
                batches[-1].append(turns.numbers[tuple(tokens[:length])])
                del tokens[:length]
        return collate(examples)

    trainer.data_collator = watched
    trainer.train()


def loop(folder: Path, shape: Shape, turns: Turns) -> None:
    """Our packs, kernels and PEFT's adapter in a loop of a few lines, without Trainer."""
    from jobs.core import attention, models
    from jobs.training.packing import flatten

    model = models.load_model(folder)
    attention.attend_by_record(model)
    adapted = _adapted(model, shape)
    _follow(adapted.parameters(), turns, lambda batch: adapted(**flatten(batch), use_cache=False).loss)


def padded(folder: Path, shape: Shape, turns: Turns) -> None:
    """Our batches as rows that are padded to the longest, and all logits, in a loop."""
    _padded(folder, shape, turns, None)


def padded_to_max_length(folder: Path, shape: Shape, turns: Turns) -> None:
    """Our batches as rows that are padded to `max_length`, and all logits, in a loop."""
    _padded(folder, shape, turns, shape.max_length)


def minimum(folder: Path, shape: Shape, turns: Turns) -> None:
    """The least that the same kernels need: Llama, LoRA and the loss written out, in a loop."""
    import torch
    from torch import nn
    from torch.nn import functional

    from jobs.core import models

    adapted = _adapted(models.load_model(folder), shape)
    model, config = adapted.base_model.model.model, adapted.config
    head = adapted.base_model.model.lm_head
    width = config.hidden_size // config.num_attention_heads
    inverse = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(shape.max_length)[:, None] * torch.cat([inverse, inverse])

    def lora(layer: Any, x: Tensor) -> Tensor:
        low = functional.linear(functional.dropout(x, shape.dropout), layer.lora_A["default"].weight)
        return torch.addmm(layer.base_layer(x), low, layer.lora_B["default"].weight.t(), alpha=layer.scaling["default"])

    def norm(layer: Any, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), layer.weight, layer.variance_epsilon)

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def loss(batch: list[Encoded]) -> Tensor:
        lengths = [len(record) for record in batch]
        labels = torch.tensor([label for record in batch for label in [-100, *record.labels()[1:]]])
        angle = torch.cat([angles[:length] for length in lengths])[:, None]
        cos, sin = angle.cos(), angle.sin()
        x = model.embed_tokens(torch.tensor([token for record in batch for token in record.tokens]))
        for layer in model.layers:
            attention, mlp, y = layer.self_attn, layer.mlp, norm(layer.input_layernorm, x)
            q, k, v = (lora(each, y).unflatten(-1, (-1, width))
                       for each in (attention.q_proj, attention.k_proj, attention.v_proj))
            rows = zip(*(each.transpose(0, 1)[None].split(lengths, 2)
                         for each in (turned(q, cos, sin), turned(k, cos, sin), v)), strict=True)
            seen = torch.cat([functional.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True)  # type: ignore[misc]
                              for row in rows], 2)[0].transpose(0, 1)
            x = x + lora(attention.o_proj, seen.flatten(1))
            y = norm(layer.post_attention_layernorm, x)
            x = x + lora(mlp.down_proj, functional.silu(lora(mlp.gate_proj, y)) * lora(mlp.up_proj, y))
        before = (labels[1:] != -100).nonzero()[:, 0]
        return nn.functional.cross_entropy(head(norm(model.norm, x[before])), labels[before + 1])

    _follow(adapted.parameters(), turns, loss)


# ours and TRL choose their batches; the others take the batches of one of them.
WAYS: dict[str, Callable[[Path, Shape, Turns], None]] = {
    "ours": ours, "TRL": trl, "padded to the longest": padded, "padded to max_length": padded_to_max_length,
    "bare loop": loop, "hand-written minimum": minimum}


def _plain_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="sdpa")


def _adapted(model: Any, shape: Shape) -> Any:
    from jobs.training.train import add_adapter

    return add_adapter(model, shape.training(), TARGETS)


def _padded(folder: Path, shape: Shape, turns: Turns, length: int | None) -> None:
    import torch

    adapted = _adapted(_plain_model(folder), shape)

    def loss(batch: list[Encoded]) -> Tensor:
        row = length or max(map(len, batch))
        ids = torch.full((len(batch), row), 2)
        labels, attended = torch.full_like(ids, -100), torch.zeros_like(ids)
        for number, record in enumerate(batch):
            ids[number, : len(record)] = torch.tensor(record.tokens)
            labels[number, : len(record)] = torch.tensor(record.labels())
            attended[number, : len(record)] = 1
        found: Tensor = adapted(input_ids=ids, attention_mask=attended, labels=labels, use_cache=False).loss
        return found

    _follow(adapted.parameters(), turns, loss)


def _follow(parameters: Any, turns: Turns, loss_of: Callable[[list[Encoded]], Tensor]) -> None:
    """Train on the batches and with the learning rates that the other way had; the rest is what Trainer does."""
    import torch

    trained = [each for each in parameters if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    while True:
        order = turns.wait()
        for group in optimizer.param_groups:
            group["lr"] = order["rate"]
        loss = loss_of([turns.records[number] for number in order["batch"]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.done(loss.item(), order["batch"], order["rate"])


if __name__ == "__main__":
    place = Path(sys.argv[2])
    chosen = Shape.read(place)
    WAYS[sys.argv[1]](place, chosen, Turns(chosen.records()))
