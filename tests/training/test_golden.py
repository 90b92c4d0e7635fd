"""The losses of a training are those of the day when this was written.

A new version of torch, transformers, PEFT or accelerate that changes training changes what existing settings give,
which nothing else here would notice. If a change is meant, bump RECIPES["adapter"] in jobs/core/plan.py and write the
new numbers: `python -m tests.training.test_golden` prints them.
"""

from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest

from jobs.core.pipeline import Lora, Training
from jobs.data.encoded import Splits
from jobs.data.encoding import Encoded
from jobs.training import callbacks, train

VOCABULARY = 211
GOLDEN = {
    "llama": {
        "loss": [5.355785, 5.464963, 5.348758, 5.278101, 5.256497, 5.243611, 5.192002, 5.14591, 5.152918, 5.073166,
                 5.115551, 5.13868, 5.153879, 5.091118],
        "validation_loss": [5.356124, 5.290509, 5.223467, 5.207069, 5.190884, 5.151683, 5.13391, 5.112234, 5.108141,
                            5.107051]},
    "gpt2": {
        "loss": [5.72576, 5.917836, 5.458635, 5.256065, 5.171097, 5.079667, 4.985322, 4.961126, 4.967862, 4.934139,
                 4.9613, 4.867685, 5.072217, 4.920571],
        "validation_loss": [5.463563, 5.279148, 5.114867, 5.031391, 4.979336, 4.930984, 4.920543, 4.909625, 4.907521,
                            4.906902]},
}
LAYERS = {"llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
          "gpt2": ["c_attn", "c_fc", "c_proj"]}
SETTINGS = Training(lora=Lora(r=4, alpha=8, dropout=0.1), epochs=2, learning_rate=3e-3, max_length=48,
                    tokens_per_batch=96, tokens_per_micro_batch=48, seed=7)


def records(count: int, seed: int) -> list[Encoded]:
    """Questions and answers in a made-up language with rules that can be learned."""
    pick, found = random.Random(seed), []
    for _ in range(count):
        word, length = pick.randrange(10, 90), pick.randrange(3, 12)
        question = [word + position % 5 for position in range(length)]
        found.append(Encoded.of([3, *question, 4], [*(token + 100 for token in question), 1]))
    return found


def base(kind: str) -> Any:
    """A model of the shape of SmolLM2 (grouped queries, SwiGLU, RMSNorm) or of GPT-2 (learned positions, Conv1D), its
    weights from a formula and not from a random generator."""
    import torch
    import transformers as t

    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if kind == "gpt2":
        model: Any = t.GPT2LMHeadModel(t.GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=64, **ids))
    else:
        model = t.LlamaForCausalLM(t.LlamaConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
            tie_word_embeddings=True, max_position_embeddings=64, **ids))
    with torch.no_grad():
        for number, weight in enumerate(model.parameters(), 1):
            if weight.dim() == 1:
                continue  # norms and biases are ones and zeros
            values = torch.arange(weight.numel(), dtype=torch.float64) * (math.sqrt(number + 1) * 1e3)
            weight.copy_(torch.sin(values).view_as(weight) * (0.5 / weight.shape[-1]) ** 0.5)
    return model


def measure(kind: str, place: Path) -> dict[str, list[float]]:
    """The losses of each step, and those on the validation split."""
    splits = Splits(records(40, 1), records(10, 2), 0, records(10, 3))
    history = train.train(base(kind), splits, SETTINGS, LAYERS[kind],
                          callbacks.Folders(place / "checkpoints", place / "tensorboard"), place / "out")
    return {key: [round(entry[key], 6) for entry in history if key in entry] for key in ("loss", "validation_loss")}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_losses_of_a_training_stay_as_they_are(tmp_path: Path, kind: str) -> None:
    found = measure(kind, tmp_path)
    assert found["loss"][-1] < found["loss"][0] - 0.1, "it learns"
    for key, losses in GOLDEN[kind].items():
        assert found[key] == pytest.approx(losses, abs=1e-5), key


if __name__ == "__main__":
    for each in LAYERS:
        with tempfile.TemporaryDirectory() as folder:
            print(f'    "{each}": {measure(each, Path(folder))},')
