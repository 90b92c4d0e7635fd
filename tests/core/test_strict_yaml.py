"""Promises of the loader: whatever a file holds, and whatever it is, the answer is one line a problem that names it."""

from __future__ import annotations

import os
import random
import socket
import string
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.core import declarations, environment, pipeline
from jobs.core.errors import UserError
from jobs.tools.pods import CHECKOUT
from tests import build_pipeline

HEAD = "adapter: a\ntraining:\n  "


def load(file: Path) -> object:
    """Load an environment file, or a pipeline file with the environment beside it."""
    return environment.load(file) if file.name == "environment.yaml" else pipeline.load(file)


def refusal(file: Path) -> str:
    """The message of the `UserError` with which `load` refuses the file."""
    with pytest.raises(UserError) as raised:
        load(file)
    return str(raised.value)


def check_message(text: str, file: Path) -> None:
    lines = text.split("\n")
    assert len(lines) <= declarations.PROBLEMS + 1
    for line in lines:
        assert line.startswith(f"{file}:"), line
        assert line.isprintable()
        assert len(line) <= 1000


@pytest.mark.parametrize(("text", "message"), [
    (HEAD + "seed: 2026-99-99", ":3: not valid YAML: '2026-99-99' cannot be read as timestamp; quote text"),
    ("{[a]: b}", ":1: not valid YAML: a key must be text; quote it"),
    ("? {a: b}\n: c", ":1: not valid YAML: a key must be text; quote it"),
    (HEAD + "epochs: !!bool x", ":3: not valid YAML: 'x' cannot be read as bool; quote text"),
    (HEAD + "epochs: !!int ''", ":3: not valid YAML: '' cannot be read as int"),
    (HEAD + "epochs: !!map x", ":3: not valid YAML: expected a mapping"),
    (HEAD + "epochs: !!python/object/apply:os.system [ls]", ":3: not valid YAML: could not determine a constructor"),
    (HEAD + f"epochs: {'9' * 5000}", ":3: not valid YAML: '999"),
    (HEAD + f"epochs: 0x{'f' * 5000}", ":3: not valid YAML: '0xfff"),
    (HEAD + f"epochs: {2**63}", ":3: not valid YAML: '9223372036854775808' cannot be read as int"),
    ("x: " + "[" * 3000, ":1: not valid YAML: more than 32 levels"),
    ("[" * 5000, ":1: not valid YAML: more than 32 levels"),
    ("{" * 5000, ":1: not valid YAML: "),
    ("- " * 5000, ":1: not valid YAML: more than 32 levels"),
    ("\n\nadapter: a\0b", ":3: not valid YAML: the character U+0000 is not allowed"),
    ("adapter: &a [*a]", ":1: not valid YAML: the alias *a contains itself"),
    ("a: &a {<<: *a}", ":1: not valid YAML: the alias *a contains itself"),
    ("a: *b", ":1: not valid YAML: found undefined alias 'b'"),
    ("x: [" + "1," * 20_000 + "]", ":1: not valid YAML: more than 10000 values"),
    ("a: 1\n---\nb: 2", ":2: not valid YAML: but found another document"),
    ("\ufeff[", ":1: not valid YAML: "),
    ('"two\\nlines": 1', r":1: two\nlines: unknown key"),
    ('"\\ud800": 1', ":1: not valid YAML: '\\ud800' holds half a character; write the character itself"),
    (HEAD + '"lora": "\\ud800"', ":3: not valid YAML: '\\ud800' holds half a character"),
    (HEAD + 'x: "\\ud83d\\ude00"', ":3: not valid YAML: '\\ud83d\\ude00' holds half a character"),
    (HEAD + "5: x", ":3: not valid YAML: a key must be text; quote it"),
    (HEAD + "? !!null\n  : x", ":3: not valid YAML: a key must be text; quote it"),
    (HEAD + "<<: [x]", ":3: not valid YAML: merges (`<<`) are not supported"),
    ("training: {seed: x}\ndataset: {source: [], holdout: {}}", ":1: training.seed: 'x': input should"),
    ("x: y\n2026-01-01: z", ":2: not valid YAML: a key must be text; quote it"),
    (f"adapter: {'a' * 900_000}", ":1: adapter: 'aaaa"),
    (f"dataset: {{source: {'a' * 900_000}}}", ":1: dataset: aaaa"),
    ("\n".join(f"k{number}: 1" for number in range(1000)), "more problems"),
])
def test_hostile_yaml_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    started = time.process_time()
    found = refusal(file)
    assert time.process_time() - started < 10
    check_message(found, file)
    assert message in found


def test_aliases_that_stand_for_gigabytes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    bombs = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12)]
    file.write_text("\n".join(["l0: &l0 [v]", *bombs]))
    assert refusal(file) == f"{file}:5: not valid YAML: more than 10000 values"


def test_an_alias_can_be_used(tmp_path: Path) -> None:
    file = tmp_path / "environment.yaml"
    file.write_text(f"base_model: &model {{source: 'hf://acme/base', revision: {'a' * 40}}}\n"
                    "reference_model: *model\n")
    assert environment.load(file).environment.reference_model.source == "hf://acme/base"


def _socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(file))


def _huge(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(20 * 10**9)


def _unreadable_folder(file: Path) -> None:
    file.mkdir()
    (file / file.name).mkdir()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["environment.yaml", "pipeline.yaml"])
@pytest.mark.parametrize(("make", "message"), [
    (os.mkfifo, ": is not a plain file"), (_socket, ": is not a plain file"),
    (_unreadable_folder, "/{name}: is not a plain file"),
    (lambda file: file.symlink_to("/dev/zero"), ": is not a plain file"),
    (lambda file: file.symlink_to(file.name), ": no such file"),
    (_huge, ": has 20.0 GB, and at most 1048576 bytes are read"),
    (lambda file: file.write_bytes(b"\xff\xfe"), ": not UTF-8 at byte 0; save it as UTF-8"),
])
def test_what_is_no_file_to_read_is_neither_read_nor_waited_for(
        tmp_path: Path, make: Callable[[Path], object], message: str, name: str) -> None:
    file = tmp_path / name
    make(file)
    assert refusal(file).startswith(f"{file}{message.format(name=name)}")


@pytest.mark.parametrize("path", ["/proc/self/mem", "/dev/null", "/dev/stdin", "nothing", "a" * 300, "a\0b", "x/y/z"])
def test_any_path_is_answered_with_one_line(path: str) -> None:
    assert "\n" not in refusal(Path(path))


def test_a_file_that_a_configmap_mounts_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "..data").mkdir()
    build_pipeline.write(tmp_path / "..data")
    for name in ("environment.yaml", "pipeline.yaml"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    pipeline.load(tmp_path)


# --- mutations of valid files --------------------------------------------------------------------------------------

FRAGMENTS = ["[", "]", "{", "}", ": ", "- ", "&a ", "*a", "!!bool ", "!!int ", "!!set ", "!!omap ", "!!binary ",
             "<<: *a", "\n", "\t", "'", '"', "|", ">", "? ", "#", "%", "@", "`", "---\n", "...\n", "\0", "\x85",
             "\u2028", "\ufeff", "2026-99-99", "2026-01-01T99:99:99Z", "null", "~", "yes", ".nan", "-.inf", "1e999",
             "0x", "0b2", "1:99", "9" * 4301, "[" * 40, "{" * 40, "\\ud800", '"\\ud800"', "é", "𝄞", "a" * 2000]
EXAMPLES = ["overlays/kind/environment.yaml", "overlays/kind/adapters/seville-hotels/pipeline.yaml"]


def mutated(lines: list[str], pick: random.Random) -> bytes:
    """A valid file with one to four mistakes, as a slip of the keyboard or a merge makes them, or an attacker."""
    lines = list(lines)
    for _ in range(pick.randrange(1, 5)):
        at = pick.randrange(len(lines))
        line = lines[at]
        column = pick.randrange(len(line) + 1)
        match pick.randrange(8):
            case 0:
                lines[at] = line[:column] + pick.choice(FRAGMENTS) + line[column:]
            case 1:
                lines[at] = line[:column] + line[column + pick.randrange(1, 5):]
            case 2:
                lines[at] = pick.choice([" ", "  ", "    ", "\t"]) + line
            case 3:
                lines[at] = line.lstrip()
            case 4:
                lines.insert(at, pick.choice(lines))
            case 5 if len(lines) > 1:
                del lines[at]
            case 6:  # another value
                lines[at] = line.partition(":")[0] + ": " + pick.choice(FRAGMENTS) + "\n"
            case 7:
                lines[at] = line[:column] + pick.choice(string.printable) + line[column + 1:]
    raw = "".join(lines).encode(errors="surrogatepass")
    if not pick.randrange(10):
        at = pick.randrange(len(raw) or 1)
        raw = raw[:at] + bytes([pick.randrange(256)]) + raw[at + 1:]
    return raw


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("seed", range(4))
def test_nothing_but_a_user_error_comes_of_a_mutated_file(tmp_path: Path, example: str, seed: int) -> None:
    pick = random.Random(seed)
    build_pipeline.write(tmp_path)
    file = tmp_path / Path(example).name
    lines = (CHECKOUT / example).read_text().splitlines(keepends=True)
    refused = 0
    for _ in range(100):
        file.write_bytes(mutated(lines, pick))
        try:
            load(file)
        except UserError as error:
            refused += 1
            check_message(str(error), file)
    assert refused > 30, "many of the mutations are mistakes"


SCALARS = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates()
           | st.binary(max_size=5))
YAML_KEYS = st.text(max_size=8) | st.integers() | st.none()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(YAML_KEYS, inner, max_size=3), max_leaves=8)
KEYS = ["adapter", "dataset", "base_model", "base_model__source", "base_model__revision", "tokenizer",
        "reference_model", "training", "training__lora", "training__lora__r", "training__lora__target_modules",
        "training__learning_rate", "evaluation", "evaluation__gate", "evaluation__gate__perplexity",
        "evaluation__acceptability", "serving", "serving__mode", "retention", "retention__keep", "dataset__holdout",
        "dataset__sha256"]


@settings(max_examples=300, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KEYS), VALUES)
def test_nothing_but_a_user_error_comes_of_any_value_at_any_key(tmp_path: Path, key: str, value: object) -> None:
    changes = {key: value}
    for file, content in ((tmp_path / "environment.yaml", build_pipeline.environment(**changes)),
                          (tmp_path / "pipeline.yaml", build_pipeline.pipeline(**changes))):
        file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
        try:
            load(file)
        except UserError as error:
            named = file if str(error).startswith(f"{file}:") else file.with_name("environment.yaml")
            check_message(str(error), named)
