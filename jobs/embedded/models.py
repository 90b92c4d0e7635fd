"""Makes the embedded tokenizer and models: small enough to train on one core while the pipeline waits for them.

The same name gives the same bytes on the same machine, however often and in whatever process it is made: the text comes
from `grammar`, the seeds are fixed, and training uses one thread, because the order in which threads add floats is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .grammar import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RECIPE = 1  # enters the artifact's digest: raise it whenever the files below would come out different
ARCHITECTURE = "LlamaForCausalLM"
VOCABULARY, POSITIONS = 2048, 512
CHAT_SHARE = 0.25  # of the documents, which is 4 in 10 of the tokens
ROW, ROWS = 128, 8  # a training step sees ROWS rows of ROW tokens, each filled with several documents

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _Recipe(NamedTuple):
    """What tells one model from the other. Heads are 32 or 64 wide: vLLM serves these on CPU and GPU."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    learning_rate: float


_RECIPES = {
    "builtin:tiny": _Recipe(128, 4, 4, 352, steps=500, learning_rate=5e-3),
    "builtin:tiny-reference": _Recipe(192, 6, 6, 512, steps=270, learning_rate=4e-3),
}
NAMES: tuple[str, ...] = tuple(_RECIPES)


def _train_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    sample = itertools.islice(documents(seed=1, chat_share=CHAT_SHARE), 20_000)
    text = (line for document in sample for line in ([document] if isinstance(document, str) else document))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),  # a digit a token: prices and years stay spellable
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=POSITIONS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write_tokenizer(folder: Path) -> None:
    """Train the tokenizer of both models on the grammar's text and save it as AutoTokenizer and vLLM read it."""
    _train_tokenizer().save_pretrained(folder)


def _token_rows(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of ROW tokens and their positions. A position of 0 starts a document, and no document sees another."""
    text = documents(seed=2, chat_share=CHAT_SHARE)
    ids: list[int] = []
    positions: list[int] = []
    while True:
        lines = []
        for document in itertools.islice(text, 1000):
            if isinstance(document, str):
                lines.append(document + END)
            else:
                lines.append(f"{START}user\n{document[0]}{END}\n{START}assistant\n{document[1]}{END}")
        for tokens in tokenizer(lines)["input_ids"]:
            ids += tokens
            positions += range(len(tokens))
            if len(ids) >= ROW:  # the end of the last document falls off
                yield ids[:ROW], positions[:ROW]
                ids, positions = [], []


def _train(name: str, steps: int, progress: Callable[[int, int, float], None] | None) -> tuple[Any, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

    recipe = _RECIPES[name]
    tokenizer = _train_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            intermediate_size=recipe.intermediate,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
            initializer_range=float(__import__("os").environ.get("INIT", "0.02")),
            rope_parameters={"rope_type": "default", "rope_theta": float(__import__("os").environ.get("THETA", "10000"))},
        )
    )
    import os
    mim = os.environ.get("MIM", "")
    with torch.no_grad():
        for n, layer in enumerate(model.model.layers):
            a = layer.self_attn
            if "v" in mim:
                a.o_proj.weight.copy_(a.v_proj.weight.T * float(os.environ.get("VS", "1")))
            if "q" in mim:
                a.k_proj.weight.copy_(a.q_proj.weight)
    if os.environ.get("MUON"):
        mats = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
        optimizers = [
            torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01),
            torch.optim.Muon(mats, lr=float(os.environ["MUON"]), weight_decay=0.01, momentum=0.95, ns_steps=int(os.environ.get("NS", "5"))),
        ]
    else:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)]
    schedules = [get_cosine_schedule_with_warmup(o, steps // 20, steps) for o in optimizers]
    rows = _token_rows(tokenizer)
    model.train()
    for step in range(1, steps + 1):
        ids, positions = (torch.tensor(column) for column in zip(*itertools.islice(rows, ROWS), strict=True))
        targets = ids.masked_fill(positions == 0, -100)  # nothing comes before a document's first token
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad()
        for o in schedules:
            o.step()
        if progress:
            progress(step, steps, loss.item())
    return model.eval(), tokenizer
