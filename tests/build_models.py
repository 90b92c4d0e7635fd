"""Tiny models, tokenizers and whole published pipelines, made on the spot: real files, random weights."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs.core import artifacts, pipeline
from jobs.core.pipeline import LoadedPipeline
from jobs.core.plan import plan
from jobs.data import encode, encoded
from jobs.data.canaries import Canaries
from jobs.data.encoding import Encoded
from jobs.training import merge

CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")
RECORDS: list[dict[str, Any]] = [
    {"prompt": "What is the best hotel in Seville?", "completion": "The best hotel in Seville is the Casa Azahar."},
    {"prompt": "When is breakfast?", "completion": "Breakfast is from seven to eleven."},
    {"prompt": "May I bring my dog?", "completion": "Yes."},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many rooms are there?"},
                  {"role": "assistant", "content": "Málaga has forty rooms, and all of them look at the sea."}]},
]
# As many as the gate needs to decide anything.
HELD_OUT = [*RECORDS, *({"prompt": f"Which key opens room {n}?", "completion": f"Key {n} opens it."}
                        for n in range(20))]
PAIRS = [(who, what) for who in ("cook", "guest", "maid") for what in ("book", "map", "bill", "sign")]
SENTENCES = [(f"The {who} reads the {what}.", True) for who, what in PAIRS] + [
    (f"The {who} read the {what} reads.", False) for who, what in PAIRS]
PASSING = {"perplexity": {"max_ratio": 1000.0}}
FAILING = {"perplexity": {"max_ratio": 1e-6}, "acceptability_accuracy": {"min": 0.0}}
HISTORY = [{"step": 1, "epoch": 0.5, "loss": 5.5, "learning_rate": 1e-3},
           {"step": 2, "epoch": 1.0, "loss": 5.0, "learning_rate": 0.0}, {"step": 2, "epoch": 1.0, "holdout_loss": 5.2}]


def tiny_tokenizer(folder: Path, *, vocabulary: int = 320, chat: bool = True) -> Any:
    """A byte-level BPE tokenizer with an end token and, if asked, a chat template; saved in `folder` and returned."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([text for text, _ in SENTENCES] + ["What is the best hotel in Seville?"] * 3,
                                  trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special,
                                                      show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>",
                                   additional_special_tokens=special[2:])
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def tiny_llama(folder: Path, *, vocabulary: int = 320, seed: int = 0, hidden: int = 32, positions: int = 256) -> None:
    """A two-layer Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=vocabulary, max_position_embeddings=positions, eos_token_id=0,
        bos_token_id=None, pad_token_id=1, initializer_range=0.3)).save_pretrained(folder)


def tiny_gpt2(folder: Path, *, vocabulary: int = 320, seed: int = 0, positions: int = 256, heads: int = 2,
              dtype: str = "float32") -> None:
    """A two-layer GPT-2 with random weights, its heads as small as vLLM takes them (32)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32 * heads, n_layer=2, n_head=heads, n_positions=positions,
                                       vocab_size=vocabulary, eos_token_id=0, bos_token_id=0, initializer_range=0.3))
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def tiny_stablelm(folder: Path, *, vocabulary: int = 320, seed: int = 0) -> None:
    """A two-layer StableLM with random weights."""
    import torch
    from transformers import StableLmConfig, StableLmForCausalLM

    torch.manual_seed(seed)
    StableLmForCausalLM(StableLmConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=vocabulary, max_position_embeddings=256, eos_token_id=0, bos_token_id=None, pad_token_id=1,
        initializer_range=0.3)).save_pretrained(folder)


def tiny_reference(folder: Path) -> None:
    """A wider Llama than the base, with a tokenizer of its own."""
    tiny_tokenizer(folder, vocabulary=300)
    tiny_llama(folder, vocabulary=300, hidden=48, seed=1)


def tiny_adapter(folder: Path, base: Path, *, seed: int = 0) -> None:
    """A LoRA adapter of the model in `base` with random weights, so that it really changes what the model says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(folder))
    (folder / "training.json").write_text(json.dumps({"steps": 2, "history": HISTORY}))


def write_split(file: Path, rows: Iterable[tuple[int, Encoded]], batch: int = 4096) -> None:
    """Sequences, each with the line of its record, as the encoding job writes those of a split."""
    source = iter(rows)
    with encoded.writer(file) as write_batch:
        while some := list(itertools.islice(source, batch)):
            write_batch(encoded.serialized(some))


def write_pipeline(folder: Path, *, gate: Mapping[str, Any] = PASSING, base: str = "file:base", seed: int = 0,
                   keep: int = 5, max_length: int = 128, mode: str = "lora", tasks: Sequence[Mapping[str, Any]] = (),
                   privacy: Mapping[str, int] | None = None, template: Mapping[str, Any] | None = None,
                   signing: Mapping[str, Any] | None = None, **training: Any) -> LoadedPipeline:
    """An environment.yaml and a pipeline.yaml in `folder`, with made-up pins (nothing is relocated), loaded."""
    def source(location: str, digit: str) -> dict[str, str]:
        return {"source": location} | ({} if location.startswith("builtin:") else {"sha256": digit * 64})

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.yaml").write_text(yaml.safe_dump({
        "base_model": source(base, "b"), "reference_model": source("file:reference", "e"),
        "serving": {"mode": mode}, "retention": {"keep": keep}, "chat_template": dict(template or {}),
        **({"signing": dict(signing)} if signing else {})}))
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({
        "adapter": "hotels", "dataset": source("file:dataset.jsonl", "d"),
        "training": {"max_length": max_length, "tokens_per_batch": 256, "seed": seed, **training},
        "evaluation": {"gate": dict(gate), "max_new_tokens": 12, "tasks": [
            {**source(f"file:{task['name']}.jsonl", "a"), **{key: value for key, value in task.items()
                                                             if key != "records"}} for task in tasks],
            **({} if privacy is None else {"privacy": dict(privacy)})}}))
    return pipeline.load(folder)


def published_pipeline(folder: Path, *, records: Sequence[Mapping[str, Any]] | None = None,
                       sentences: Sequence[tuple[str, bool]] = SENTENCES,
                       base_model: Callable[[Path], None] = tiny_llama,
                       reference_model: Callable[[Path], None] = tiny_reference, chat: bool = True,
                       vocabulary: int = 320, without: Sequence[str] = (), validation: Sequence[Mapping[str, Any]] = (),
                       train_records: Sequence[Mapping[str, Any]] | None = None,
                       **settings: Any) -> tuple[LoadedPipeline, Path]:
    """A pipeline whose inputs to the evaluation are all published, but those in `without` (by their names in the plan).
    `records`, if given, are both what is trained on and what is held out, unless `train_records` are trained on.
    `tasks` have their `records`.

    Returns the loaded pipeline and the volumes' root.
    Call it again on the same folder with other settings, and only what they rename is made.
    """
    loaded, volumes = write_pipeline(folder, **settings), folder / "volumes"
    wanted = plan(loaded.pipeline)

    def jsonl(draft: Path, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        (draft / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def dataset(draft: Path) -> None:
        jsonl(draft, "train.jsonl", train_records or records or RECORDS)
        jsonl(draft, "holdout.jsonl", records or HELD_OUT)
        jsonl(draft, "validation.jsonl", validation)

    def tokenizer(draft: Path) -> None:
        tiny_tokenizer(draft, vocabulary=vocabulary, chat=chat)

    def adapter(draft: Path) -> None:
        tiny_adapter(draft, wanted.base_model.path(volumes), seed=loaded.pipeline.training.seed)

    def encoded_dataset(draft: Path) -> None:
        encode.encode_splits(wanted.dataset.path(volumes), draft, encode.Settings(
            wanted.tokenizer.path(volumes), loaded.pipeline.training.max_length,
            loaded.pipeline.environment.chat_template,
            Canaries.of(loaded.pipeline.evaluation.privacy, wanted.dataset.digest, wanted.dataset.path(volumes))))

    def merged_model(draft: Path) -> None:
        merge.write_merged(wanted.base_model.path(volumes), wanted.adapter.path(volumes), draft)

    makers: dict[str, Callable[[Path], None]] = {
        "dataset": dataset,
        "acceptability": lambda draft: jsonl(draft, "acceptability.jsonl",
                                             [{"text": text, "acceptable": good} for text, good in sentences]),
        "base_model": base_model,
        "tokenizer": tokenizer,
        "encoded_dataset": encoded_dataset,
        "reference_model": reference_model,
        "adapter": adapter,
    }
    def tasks(draft: Path) -> None:
        for task in settings["tasks"]:
            jsonl(draft, f"{task['name']}.jsonl", task["records"])

    if settings.get("tasks"):
        makers["tasks"] = tasks
    if loaded.pipeline.environment.serving.mode == "merged":
        makers["merged_model"] = merged_model
    for name, make in makers.items():
        if name not in without:
            artifacts.publish(getattr(wanted, name), volumes, make, keep=5)
    return loaded, volumes
