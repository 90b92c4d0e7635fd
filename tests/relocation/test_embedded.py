"""What the embedded models promise: the same bytes everywhere on a machine, plain English, and no download."""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from jobs.relocation import embedded
from jobs.relocation.embedded import grammar

QUESTION = [{"role": "user", "content": "Where does the farmer sleep?"}]
SCRIPT = """
import sys
from pathlib import Path
from jobs.relocation.embedded import models
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
models.write_tokenizer(folder)
for name in models.NAMES:
    models.write_model(name, folder / name.split(":")[1], _steps=steps)
"""


def make(folder: Path, steps: int, hash_seed: str) -> dict[str, str]:
    """The sha256 of every file that another process makes."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", SCRIPT, folder, str(steps)], check=True, env=environment)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    embedded.write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def correlation(model: Any, tokenizer: Any, pairs: list[tuple[str, bool]]) -> float:
    """Matthews correlation of mean token log-probability, its threshold chosen on the other half of the pairs."""
    import torch
    from sklearn.metrics import matthews_corrcoef

    scores = []
    for sentence, _ in pairs:
        ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        scores.append(logs.gather(-1, ids[0, 1:, None]).mean().item())
    labels, half = [label for _, label in pairs], len(pairs) // 2

    def at(threshold: float, part: slice) -> float:
        return float(matthews_corrcoef(labels[part], [score >= threshold for score in scores[part]]))

    chosen = max(sorted(scores[:half]), key=lambda threshold: at(threshold, slice(half)))
    return at(chosen, slice(half, None))


def test_importing_the_package_is_quick() -> None:
    """A finished stage exits within seconds, so nothing heavy may be imported before it is needed."""
    code = ("import sys, jobs.relocation.embedded\n"
            "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'tokenizers')))")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_pairs_are_balanced_and_the_same_on_every_call() -> None:
    pairs = embedded.acceptability_pairs()
    assert len(pairs) == 1000 and sum(good for _, good in pairs) == 500
    assert len({sentence for sentence, _ in pairs}) == 1000
    assert pairs == embedded.acceptability_pairs()
    halves = [sum(good for _, good in part) for part in (pairs[:500], pairs[500:])]
    assert min(halves) > 175, "shuffled: a threshold can be chosen on either half"


def test_no_judged_sentence_was_ever_training_text() -> None:
    seen: set[str] = set()
    for seed in (1, 2):
        for document in islice(grammar.documents(seed, 0.4), 20_000):
            seen.update([document] if isinstance(document, str) else document)
    assert not seen & {sentence for sentence, _ in embedded.acceptability_pairs(1000)}


def test_the_grammar_never_says_an_unacceptable_sentence() -> None:
    """An "unacceptable" sentence that the grammar also writes would be a wrong label."""
    speaker = grammar._Speaker(5)
    said = {grammar._render(speaker.sentence()) for _ in range(100_000)}
    assert not [sentence for sentence, good in embedded.acceptability_pairs(1000) if not good and sentence in said]


def test_a_pair_differs_only_in_its_mistakes() -> None:
    markup = "[the farmers|farmers the] [sleep|sleeps] in the barn ."
    assert grammar._render(markup) == "The farmers sleep in the barn."
    wrong = {grammar._render(markup, random.Random(seed)) for seed in range(20)}
    assert wrong == {"Farmers the sleeps in the barn."}


def test_the_base_model_knows_no_fact_of_the_example_dataset() -> None:
    text = " ".join(str(document) for document in islice(grammar.documents(2, 0.45), 20_000))
    for name in ("Azahar", "Brisalba", "Naranja Amarga", "Jasmine Circle", "Robledal"):
        assert name not in text


def test_the_tokenizer_keeps_any_text(tokenizer: Any) -> None:
    for text in ("The farmer sleeps in the barn.", "Señora Ibáñez pays 1,250.40 € — 你好 🙂\n\ttwice  spaced", " "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("The farmer")["input_ids"][0] != tokenizer.bos_token_id
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_chat_template_renders_a_conversation(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWhere does the farmer sleep?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(text)["input_ids"].count(tokenizer.eos_token_id) == 1, "special tokens are one token each"


def test_tokenizer_and_models_are_the_same_in_every_process_and_load_offline(tmp_path: Path) -> None:
    """A killed relocation that starts again makes the artifact that it would have made."""
    from transformers import AutoModelForCausalLM

    made = make(tmp_path / "a", 3, "1")
    assert made == make(tmp_path / "b", 3, "2")
    assert "tokenizer.json" in made
    sizes = []
    for name in embedded.NAMES:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / name.split(":")[1], local_files_only=True)
        assert model.config.architectures == [embedded.ARCHITECTURE] and not model.generation_config.do_sample
        sizes.append(model.num_parameters())
    assert sizes[0] < sizes[1]


def test_making_a_model_reports_progress_and_leaves_torch_as_it_was(tmp_path: Path,
                                                                    caplog: pytest.LogCaptureFixture) -> None:
    import torch

    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    caplog.set_level("INFO", "jobs")
    embedded.write_model("builtin:tiny", tmp_path, _steps=2)
    assert re.search(r"builtin:tiny: training steps: 2 in .* s, .*/s, loss \d\.\d\d", caplog.text)
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
def test_the_base_model_tells_english_from_broken_english(embedded_models: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    (folder,) = (embedded_models / "base-model" / "base-model").glob("[0-9a-f]*")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    assert correlation(model, tokenizer, embedded.acceptability_pairs()) >= 0.6
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :].tolist()
    assert answer[-1] == tokenizer.eos_token_id, "an answer ends"
