"""Builds what is served: a tiny base model, its tokenizer and adapters, published and promoted as the jobs do it.

Real artifacts, named by a real pipeline file; only the weights are random. Adapters differ by `training.seed`.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.core import artifacts, pipeline, promotion
from jobs.core.artifacts import digest_of
from jobs.core.files import sha256_of
from jobs.core.pipeline import Pipeline
from jobs.core.plan import FINE_TUNED_VOLUME, Plan, plan
from jobs.core.proof import FILE, Proof
from tests import build_pipeline

TEXT = ["The best hotel in Seville is the one with the orange trees.", "What is the best hotel?", "Answer it."]
TEMPLATE = ("{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
# An answered question, a conversation and a text, which has no messages.
HELD_OUT: list[dict[str, Any]] = [{"prompt": "What is the best hotel?", "completion": "The one with the orange trees."},
            {"messages": [{"role": "user", "content": "Answer it."}, {"role": "assistant", "content": "No."},
                          {"role": "user", "content": "Is it the best?"}, {"role": "assistant", "content": "Yes."}]},
            {"text": "The best hotel in Seville is the one with the orange trees."}]
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load(folder: Path, **changes: Any) -> tuple[Pipeline, Plan]:
    """Write `folder/pipeline.yaml` for an embedded base model, with `changes` as in build_pipeline, and plan it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = build_pipeline.write(folder, **{"base_model": {"source": "builtin:tiny"}, **changes})
    loaded = pipeline.load(file).pipeline
    return loaded, plan(loaded)


def declare(folder: Path, **changes: Any) -> tuple[Pipeline, Plan]:
    """Write `folder/environment.yaml` and `folder/NAME.yaml`, as a server mounts them, and plan it. As `load`."""
    folder.mkdir(parents=True, exist_ok=True)
    changes = {"base_model": {"source": "builtin:tiny"}, **changes}
    build_pipeline.write_yaml(folder / "environment.yaml", build_pipeline.environment(**changes))
    content = build_pipeline.pipeline(**changes)
    build_pipeline.write_yaml(folder / f"{content['adapter']}.yaml", content)
    loaded = build_pipeline.build(**changes)
    return loaded, plan(loaded)


@functools.cache
def models() -> Path:
    """A folder with `base` (a random Llama) and `tokenizer` (a byte-level BPE), made once per test process."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as tokenizer_models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(tempfile.mkdtemp(prefix="build-adapter-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    bpe = Tokenizer(tokenizer_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, head_dim=32,
                         initializer_range=0.3, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    # As on the hub, where both are one repository: vLLM looks for a model type beside the tokenizer, and complains.
    shutil.copy(folder / "base" / "config.json", folder / "tokenizer")
    return folder


def base(volumes: Path, planned: Plan) -> None:
    """Publish the base model and its tokenizer."""
    artifacts.publish(planned.base_model, volumes, _copy_of(models() / "base"), keep=9)
    artifacts.publish(planned.tokenizer, volumes, _copy_of(models() / "tokenizer"), keep=9)


def adapter(volumes: Path, desired: Pipeline, change: Callable[[Path], object] | None = None) -> Path:
    """Publish the adapter that the pipeline desires, after `change` had its way with the files; return its folder."""
    planned = plan(desired)

    def write(draft: Path) -> None:
        shutil.copytree(_desired(desired), draft, dirs_exist_ok=True)
        if change:
            change(draft)

    return artifacts.publish(planned.adapter, volumes, write, keep=9).path


def _desired(desired: Pipeline) -> Path:
    lora = desired.training.lora
    layers = LAYERS if isinstance(lora.target_modules, str) else lora.target_modules
    return _written(lora.r, desired.training.seed, lora.alpha, tuple(layers))


def write_adapter(folder: Path, *, r: int, seed: int, alpha: float | None = None,
                  layers: Sequence[str] = LAYERS) -> None:
    """Write an adapter with random A and B, in PEFT's own format; `alpha` is 2 r unless given."""
    shutil.copytree(_written(r, seed, 2 * r if alpha is None else alpha, tuple(layers)), folder, dirs_exist_ok=True)


@functools.cache
def _written(r: int, seed: int, alpha: float, layers: tuple[str, ...]) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed + 1)
    model = LlamaForCausalLM.from_pretrained(models() / "base")
    # init_lora_weights=False leaves B random instead of zero
    adapted = get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha,  # type: ignore[arg-type]
                                               target_modules=list(layers), init_lora_weights=False,
                                               task_type="CAUSAL_LM"))
    folder = Path(tempfile.mkdtemp(dir=models()))
    adapted.save_pretrained(folder)
    return folder


def double_scale(folder: Path) -> None:
    """Let an adapter change twice as much as it did. (Its config is compared with the pipeline file.)"""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({key: 2 * value if "lora_B" in key else value for key, value in load_file(file).items()}, file)


# By what they were made of: to compute one takes as long as many a test.
_proofs: dict[str, Proof] = {}


def proof_of(adapter: Path, base: Path, tokenizer: Path, template: Mapping[str, Any] | None = None) -> Proof:
    """What the base model in a folder answers with the adapter in another, to the prompts of `HELD_OUT`."""
    from peft import PeftModel

    from jobs.core import models as core_models
    from jobs.evaluation.proof import record
    from jobs.evaluation.scoring import Material

    files = [adapter / "adapter_model.safetensors", adapter / "adapter_config.json", base / "model.safetensors",
             *(tokenizer.glob("*.j*"))]
    key = digest_of("proof", {"template": dict(template or {})}, {each.name: sha256_of(each) for each in files})
    if key not in _proofs:
        material = Material(HELD_OUT, (), 256, 4, dict(template or {}))
        model = PeftModel.from_pretrained(core_models.load_model(base), str(adapter))
        made = record(model.eval(), core_models.load_tokenizer(tokenizer), material)
        assert made
        _proofs[key] = made
    return _proofs[key]


def prove(volumes: Path, desired: Pipeline, adapter: Path | None = None) -> Proof:
    """The proof of the adapter that the pipeline desires, or of another one, on what is published."""
    planned = plan(desired)
    base, tokenizer = (published if published.exists() else models() / name for name, published in (
        ("base", planned.base_model.path(volumes)), ("tokenizer", planned.tokenizer.path(volumes))))
    return proof_of(adapter or _desired(desired), base, tokenizer, desired.environment.chat_template)


def evaluation(volumes: Path, desired: Pipeline, *, passed: object = True, recipe: int | None = None,
               change: Callable[[Path], object] | None = None, proven: Path | None = None) -> Path:
    """Publish the evaluation that the pipeline desires, with a verdict, after `change` had its way with the files.

    Args:
        recipe: an earlier one, in which evaluations had no proof.
        proven: the adapter that is proven; by default the one that `adapter` makes.
    """
    planned = plan(desired)
    if recipe:
        spec = {**planned.evaluation.spec, "recipe": recipe}
        planned = dataclasses.replace(planned, evaluation=dataclasses.replace(planned.evaluation, spec=spec))
    verdict = {"passed": passed, "adapter": {"name": desired.adapter, "digest": planned.adapter.digest}}

    def write(draft: Path) -> None:
        (draft / "evaluation.json").write_text(json.dumps(verdict))
        if not recipe:
            (draft / FILE).write_text(prove(volumes, desired, proven).to_json())
        if change:
            change(draft)

    return artifacts.publish(planned.evaluation, volumes, write, keep=9).path


def promote(volumes: Path, desired: Pipeline, change: Callable[[Path], object] | None = None,
            evaluation_change: Callable[[Path], object] | None = None, **evaluated: Any) -> Path:
    """What a training and a passed evaluation do together: adapter, evaluation, promotion. Returns the adapter.

    Args:
        evaluation_change: has its way with the files of the evaluation.
        evaluated: as in `evaluation`.
    """
    planned = plan(desired)
    path = adapter(volumes, desired, change)
    found = evaluation(volumes, desired, change=evaluation_change, **evaluated)
    promotion.promote(volumes / FINE_TUNED_VOLUME, desired.adapter, planned.adapter.digest, found.name)
    return path


def _copy_of(folder: Path) -> Callable[[Path], None]:
    def copy(draft: Path) -> None:
        shutil.copytree(folder, draft, dirs_exist_ok=True)

    return copy
