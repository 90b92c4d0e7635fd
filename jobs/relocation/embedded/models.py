"""Makes the embedded tokenizer and models: small enough to train on one core while the pipeline waits for them.

The same name gives the same bytes on the same machine, however often and in whatever process it is made: the text comes
from `grammar`, the seeds are fixed, and training uses one thread, because the order in which threads add floats is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.core.progress import Progress
from jobs.relocation.embedded.grammar import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Raise RECIPES["embedded"] in jobs/core/plan.py whenever the files below would come out different.
ARCHITECTURE = "LlamaForCausalLM"
VOCABULARY, POSITIONS = 2048, 512
ROW, ROWS = 128, 8  # a training step sees ROWS rows of ROW tokens, each filled with several documents

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _Recipe(NamedTuple):
    """What tells one model from the other. Heads are 32 wide, which vLLM serves on CPU and GPU alike.

    Only the base needs to converse well, because it is fine-tuned on chats: the reference sees more plain sentences.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    chat_share: float  # of the documents


_RECIPES = {
    "builtin:tiny": _Recipe(128, 4, 4, 352, steps=350, chat_share=0.5),
    "builtin:tiny-reference": _Recipe(192, 4, 6, 640, steps=210, chat_share=0.25),
}
EMBEDDING_RATE, MATRIX_RATE = 6e-3, 0.02  # of AdamW (embeddings and norms), of Muon (everything else)
NAMES: tuple[str, ...] = tuple(_RECIPES)


def _train_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    sample = itertools.islice(documents(seed=1, chat_share=0.5), 20_000)
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


def _token_rows(tokenizer: PreTrainedTokenizerFast, chat_share: float) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of ROW tokens and their positions. A position of 0 starts a document, and no document sees another."""
    text = documents(seed=2, chat_share=chat_share)
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


def _muon(matrices: list[Any]) -> Callable[[float], None]:
    """The Muon optimizer (momentum whose update is made orthogonal) for a model's matrices, as a step function.

    It needs half the tokens that AdamW does here. torch.optim.Muon works in bfloat16, which crawls on older processors.
    """
    import torch

    groups: list[tuple[list[Any], Any]] = []
    for shape in sorted({tuple(matrix.shape) for matrix in matrices}):
        members = [matrix for matrix in matrices if tuple(matrix.shape) == shape]
        groups.append((members, torch.zeros(len(members), *shape)))

    def step(learning_rate: float) -> None:
        for members, momentum in groups:
            gradient = torch.stack([matrix.grad for matrix in members])
            momentum.lerp_(gradient, 0.05)
            x = gradient.lerp(momentum, 0.95)
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):  # Newton-Schulz, with the usual coefficients
                a = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
            x = x.mT if tall else x
            scale = max(1.0, x.shape[1] / x.shape[2]) ** 0.5
            for matrix, update in zip(members, x, strict=True):
                matrix.data.mul_(1 - 0.01 * learning_rate).sub_(update, alpha=learning_rate * scale)

    return step


def _train(name: str, steps: int) -> tuple[Any, Any]:
    """The trained model and its tokenizer. Seeds torch's global generator; the caller isolates that."""
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
            initializer_range=recipe.hidden**-0.5,  # the usual 0.02 is meant for models five times as wide
        )
    )
    layers = model.model.layers
    with torch.no_grad():
        for layer in layers:  # attending to a word makes it likelier from the start: reusing words is learned sooner
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)
    step_matrices = _muon([module.weight for module in layers.modules() if isinstance(module, torch.nn.Linear)])
    others = [weights for key, weights in model.named_parameters() if weights.ndim == 1 or "embed" in key]
    optimizer = torch.optim.AdamW(others, lr=EMBEDDING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    rows = _token_rows(tokenizer, recipe.chat_share)
    model.train()
    progress = Progress(f"{name}: training steps", steps)
    for _ in range(steps):
        ids, positions = (torch.tensor(column) for column in zip(*itertools.islice(rows, ROWS), strict=True))
        targets = ids.masked_fill(positions == 0, -100)  # nothing comes before a document's first token
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_matrices(MATRIX_RATE * schedule.get_last_lr()[0] / EMBEDDING_RATE)
        optimizer.step()
        schedule.step()
        model.zero_grad()
        progress.add(1, lambda: f"loss {loss.item():.2f}")  # noqa: B023 - called at once
    return model.eval(), tokenizer


def write_model(name: str, folder: Path, *, _steps: int | None = None) -> None:
    """Train an embedded model and save it as transformers and vLLM read it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            model, _ = _train(name, _steps or _RECIPES[name].steps)
    finally:
        torch.set_num_threads(threads)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
