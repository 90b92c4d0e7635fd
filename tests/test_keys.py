"""Promises of the file of keys: what is valid, what a running server does with a change, and how a key is made."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.core.errors import UserError
from jobs.tools.pods import CHECKOUT, write_config_map
from serving import events, keys
from serving.keys import ANYBODY, Keys


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def entry(name: str, key: str, models: str = '"*"') -> str:
    return f'- name: {name}\n  sha256: "{sha256(key)}"\n  models: {models}\n'


def write(folder: Path, *entries: str) -> Path:
    file = folder / "keys.yaml"
    file.write_text("keys:\n" + "".join(entries) if entries else "keys: []\n")
    return file


def name_of(held: Keys, key: str) -> str | None:
    found = held.find(key.encode())
    return found.name if found else None


# What a valid file is


def test_a_key_opens_the_models_of_its_entry_and_no_others(tmp_path: Path) -> None:
    file = write(tmp_path, entry("team-a", "one", "[seville-hotels, hf-owner/base]"), entry("admin", "two"))
    held = keys.load(file)
    team, admin = held[hashlib.sha256(b"one").digest()], held[hashlib.sha256(b"two").digest()]
    assert (team.name, admin.name) == ("team-a", "admin")
    assert team.may_use("seville-hotels") and team.may_use("hf-owner/base")
    assert admin.may_use("anything")
    for other in ("granada-hotels", "Seville-hotels", "seville-hotels ", "seville-hotel",
                  "seville-hotels@0123456789abcdef",
                  "\N{FULLWIDTH LATIN SMALL LETTER S}eville-hotels", "seville\N{NON-BREAKING HYPHEN}hotels", "*", ""):
        assert not team.may_use(other), other


def test_the_digits_of_a_hash_may_be_upper_case(tmp_path: Path) -> None:
    file = write(tmp_path, entry("team-a", "one").replace(sha256("one"), sha256("one").upper()))
    assert list(keys.load(file)) == [hashlib.sha256(b"one").digest()]


HASH = sha256("one")
START = f'keys:\n- name: a\n  sha256: "{HASH}"\n'


@pytest.mark.parametrize(("text", "problem"), [
    ("", "must hold a mapping with the key `keys`"),
    ("[]", "must hold a mapping"),
    ("keys:\n", "1: keys: None: input should be a valid list"),
    ("{}", "1: keys: is missing"),
    ("keys: []\nkey: 1\n", "2: key: unknown key; did you mean `keys`?"),
    ("keys:\n- name: a\n  models: [x]\n", "2: keys.0.sha256: is missing"),
    (START, "2: keys.0: `models` is missing"),
    (START + "  models:\n", "2: keys.0: `models` is missing"),
    (START + "  metrics: false\n", "2: keys.0: `models` is missing"),
    (START + "  metrics: 1\n", "2: keys.0: `models` is missing"),
    (START + "  models: [x]\n  metrics: maybe\n", "5: keys.0.metrics: 'maybe': input should be a valid boolean"),
    (START + '  models: [x]\n  model: x\n', "5: keys.0.model: unknown key; did you mean"),
    (START + '  models: []\n', "4: keys.0.models: a list: must be a list of model names"),
    (START + '  models: x\n', '4: keys.0.models: \'x\': must be a list of model names, or "*"'),
    (START + '  models: ["*"]\n', "4: keys.0.models: a list: must be"),
    (START + '  models: [" x"]\n', "4: keys.0.models: a list: must be"),
    (START + '  models: [1]\n', "4: keys.0.models: a list: must be"),
    (START + '  models: {x: y}\n', "4: keys.0.models: must be"),
    (START + '  models: *\n', "4: not valid YAML"),
    (f'keys:\n- name: Team A\n  sha256: "{HASH}"\n  models: [x]\n', "2: keys.0.name: 'Team A': must be 1 to 63 of"),
    (f'keys:\n- name: {"a" * 64}\n  sha256: "{HASH}"\n  models: [x]\n', "2: keys.0.name:"),
    (f'keys:\n- name: 7\n  sha256: "{HASH}"\n  models: [x]\n', "2: keys.0.name: 7: input should be a valid string"),
    (f'keys:\n- name: "a\\n"\n  sha256: "{HASH}"\n  models: [x]\n', "2: keys.0.name:"),
    ('keys:\n- name: a\n  sha256: sk-lora-secret\n  models: [x]\n', "2: keys.0: `sha256` must be 64 hex digits"),
    (f'keys:\n- name: a\n  sha256: "{HASH}0"\n  models: [x]\n', "`sha256` must be 64 hex digits"),
    (f'keys:\n- name: a\n  sha256: "{HASH}\\n"\n  models: [x]\n', "`sha256` must be 64 hex digits"),
    (f'keys:\n- name: a\n  sha256: "{sha256("")}"\n  models: [x]\n', "2: keys.0: `sha256` is the hash of an empty key"),
    (f'keys:\n- name: a\n  name: b\n  sha256: "{HASH}"\n  models: [x]\n', "3: not valid YAML: duplicate key `name`"),
    ("keys: [1]\n", "1: keys.0: 1: input should be"),
    ("keys:\n- name: \x07\n", "2: not valid YAML: the character U+0007"),
    ("keys:\n- {name: a, sha2", "not valid YAML")])
def test_what_is_wrong_is_named_with_file_line_and_key(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        keys.load(tmp_path / "keys.yaml")
    assert problem in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path}/keys.yaml:")
    assert "sk-lora-secret" not in str(refused.value)


def test_a_name_or_a_hash_that_is_there_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    file = write(tmp_path, entry("a", "one"), entry("b", "two"), entry("a", "one").replace(HASH, HASH.upper()))
    with pytest.raises(UserError) as refused:
        keys.load(file)
    assert str(refused.value).splitlines() == [f"{file}:8: keys.2.name: is the same as in line 2",
                                               f"{file}:9: keys.2.sha256: is the same as in line 3"]


def test_a_file_that_is_too_large_or_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_bytes(b"keys: [\xff]")
    with pytest.raises(UserError, match="not UTF-8 at byte 7"):
        keys.load(file)
    file.write_text("#" * 2**20 + "\nkeys: []")
    with pytest.raises(UserError, match="at most 1048576 bytes"):
        keys.load(file)


@settings(max_examples=200, deadline=None)
@given(content=st.binary() | st.text().map(str.encode) | st.tuples(
    st.integers(0, 200), st.integers(0, 200), st.text(max_size=3)).map(lambda cut: (
        (text := "keys:\n" + entry("a", "one", "[x, y]") + entry("b", "two"))[:cut[0]] + cut[2]
        + text[cut[0] + cut[1]:]).encode()))
def test_whatever_the_file_holds_it_is_valid_or_the_users_error(
        tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any-keys.yaml"
    file.write_bytes(content)
    try:
        problem = ""
        digests = list(keys.load(file))
    except UserError as error:
        digests, problem = [], str(error)
    assert all(len(digest) == 32 for digest in digests)
    assert not problem or problem.startswith(str(file))


# A running server


def test_without_a_file_and_a_single_key_everybody_may_use_everything(tmp_path: Path,
                                                                      caplog: pytest.LogCaptureFixture) -> None:
    held = Keys(tmp_path / "keys.yaml", None)
    assert not held.required and not held.metrics_need_key and not held.locked
    assert "no keys: everybody who can reach this server" in caplog.text
    assert "is gone" not in caplog.text, "it was never there"
    assert ANYBODY.may_use("anything")
    assert not Keys(tmp_path / "folder-that-is-missing" / "keys.yaml", None).required


def test_the_single_key_works_beside_the_file_and_without_it(tmp_path: Path) -> None:
    held = Keys(tmp_path / "keys.yaml", "single")
    assert held.required
    assert (name_of(held, "single"), name_of(held, "one")) == ("VLLM_API_KEY", None)
    write(tmp_path, entry("team-a", "one", "[x]"))
    held.read()
    assert (name_of(held, "single"), name_of(held, "one")) == ("VLLM_API_KEY", "team-a")


@pytest.mark.parametrize("token", [b"", b"on", b"onee", b"one ", b" one", b"ONE", b"one\n", b"\xff\xfe", b"one\x00",
                                   HASH.encode(), bytes.fromhex(HASH), b"x" * 10**6])
def test_only_the_very_key_is_found(tmp_path: Path, token: bytes) -> None:
    held = Keys(write(tmp_path, entry("team-a", "one")), "single")
    assert held.find(token) is None


def test_a_wrong_key_is_refused_however_much_its_hash_is_alike(tmp_path: Path) -> None:
    """Keys are compared by all bytes of their hashes, not by some of them."""
    right = [hashlib.sha256(key).digest() for key in (b"single", b"one")]
    wrong = [f"wrong{i}".encode() for i in range(200_000)]
    alike = [key for key in wrong if any(hashlib.sha256(key).digest()[part] == digest[part] for digest in right
                                         for part in (slice(2), slice(-2, None)))]
    assert len(alike) > 5
    held = Keys(write(tmp_path, entry("team-a", "one")), "single")
    assert not [key for key in alike if held.find(key)]


def test_changes_are_followed_and_a_removed_key_is_not_valid_any_more(tmp_path: Path) -> None:
    """As the kubelet changes a Secret: the link `..data` is switched from one folder to the next."""
    folder = tmp_path / "serving-keys"
    text = write(tmp_path, entry("team-a", "one"), entry("team-b", "two")).read_text()
    write_config_map(folder, {"keys.yaml": text})
    held = Keys(folder / "keys.yaml", None)
    assert (name_of(held, "one"), name_of(held, "two")) == ("team-a", "team-b")
    write_config_map(folder, {"keys.yaml": write(tmp_path, entry("team-b", "two")).read_text()})
    held.read()
    assert (name_of(held, "one"), name_of(held, "two")) == (None, "team-b")
    write_config_map(folder, {"keys.yaml": "keys: []\n"})
    held.read()
    assert (name_of(held, "one"), name_of(held, "two"), held.required) == (None, None, True)


def test_a_change_that_keeps_size_and_times_is_followed(tmp_path: Path) -> None:
    file = write(tmp_path, entry("team-a", "one"))
    held, stat = Keys(file, None), file.stat()
    write(tmp_path, entry("team-a", "two"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    held.read()
    assert (name_of(held, "one"), name_of(held, "two")) == (None, "team-a")


def test_the_log_names_the_keys_that_are_valid(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path, entry("team-b", "two"), entry("team-a", "one"))
    held = Keys(file, None)
    assert caplog.messages == ["2 keys: team-a, team-b"]
    write(tmp_path)
    held.read()
    assert caplog.messages[1:] == ["0 keys: none"]


def test_metrics_need_a_key_once_an_entry_has_them_also_when_the_file_is_gone(tmp_path: Path) -> None:
    file = write(tmp_path, entry("team-a", "one"))
    held = Keys(file, "single")
    assert not held.metrics_need_key
    write(tmp_path, entry("team-a", "one"), f'- {{name: prometheus, sha256: "{sha256("two")}", metrics: true}}\n')
    held.read()
    assert held.metrics_need_key
    found = {key: held.find(key) for key in (b"one", b"two", b"single")}
    assert {key: value.metrics for key, value in found.items() if value} == {
        b"one": False, b"two": True, b"single": True}
    assert found[b"two"] and not found[b"two"].may_use("seville-hotels")
    file.unlink()
    held.read()
    assert held.metrics_need_key
    write(tmp_path, entry("team-a", "one"))
    held.read()
    assert not held.metrics_need_key


@pytest.mark.parametrize("content", [b"", b"keys:\n- name: te", b"\xff", b"keys: [{}]", b"#" * (2**20 + 1)])
def test_an_invalid_change_keeps_the_last_valid_keys_and_is_logged_and_counted_once(
        tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path, entry("team-a", "one"))
    held, before = Keys(file, None), events.KEYS_REFUSED._value.get()
    file.write_bytes(content)
    for _ in range(3):
        held.read()
    assert (name_of(held, "one"), held.problem) == ("team-a", None)
    assert events.KEYS_REFUSED._value.get() == before + 1
    (message,) = [each for each in caplog.messages if "its last valid keys stay valid" in each]
    assert str(file) in message
    write(tmp_path, entry("team-b", "two"))
    held.read()
    assert (name_of(held, "one"), name_of(held, "two")) == (None, "team-b")


def test_a_file_that_is_invalid_from_the_start_lets_only_the_holder_of_the_single_key_in(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("keys: [")
    closed, single = Keys(file, None), Keys(file, "single")
    assert closed.required and closed.locked and closed.metrics_need_key
    assert "no key of it is valid" in caplog.text
    assert single.required and not single.locked
    assert (name_of(single, "single"), name_of(closed, "single")) == ("VLLM_API_KEY", None)
    file.write_text("keys: [[")
    closed.read()
    assert closed.locked and closed.problem and "keys.yaml" in closed.problem
    write(tmp_path, entry("team-a", "one"))
    closed.read()
    assert not closed.locked and name_of(closed, "one") == "team-a"


def test_a_file_that_is_removed_takes_its_keys_with_it_and_does_not_open_the_server(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path, entry("team-a", "one"))
    held = Keys(file, None)
    file.unlink()
    held.read()
    assert held.required and name_of(held, "one") is None
    assert f"{file} is gone, and its keys are not valid any more" in caplog.messages
    write(tmp_path, entry("team-a", "one"))
    held.read()
    assert name_of(held, "one") == "team-a"


def test_a_file_that_appears_later_closes_an_open_server(tmp_path: Path) -> None:
    held = Keys(tmp_path / "keys.yaml", None)
    assert not held.required
    write(tmp_path, entry("team-a", "one"))
    held.read()
    assert held.required and name_of(held, "one") == "team-a"


def test_it_follows_by_itself_also_after_an_unexpected_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(keys, "POLL_SECONDS", 0.01)
    held = Keys(write(tmp_path, entry("team-a", "one")), None)

    async def changes() -> None:
        held.start()
        with monkeypatch.context() as broken:
            broken.setattr(keys, "read_plain_file", lambda *_, **__: 1 / 0)
            await asyncio.sleep(0.1)
        write(tmp_path, entry("team-b", "two"))
        async with asyncio.timeout(10):
            while name_of(held, "two") is None:
                await asyncio.sleep(0.01)
        assert held._task
        await held.stop()
        assert held._task.done()

    asyncio.run(changes())
    assert name_of(held, "one") is None
    assert "cannot look for changed keys" in caplog.text


# The salt of vLLM's prefix cache


def test_every_key_has_a_salt_of_its_own_which_differs_between_processes(tmp_path: Path) -> None:
    file = write(tmp_path, entry("team-a", "one"), entry("team-b", "two"))
    held, again = Keys(file, "single"), Keys(file, "single")
    found = [held.find(key) for key in (b"one", b"two", b"single")]
    salts = {each.salt(key, own) for each in (held, again) for key in found if key for own in ("", "x", "y")}
    assert len(salts) == 2 * 3 * 3
    assert all(salt and re.fullmatch("[0-9a-f]{64}", salt) for salt in salts)
    assert found[0] and held.salt(found[0], "x") == held.salt(found[0], "x") and held.salt(found[0], "\ud800")


def test_the_next_holder_of_a_name_gets_another_salt(tmp_path: Path) -> None:
    held = Keys(write(tmp_path, entry("team-a", "one")), None)
    first = held.find(b"one")
    write(tmp_path, entry("team-a", "two"))
    held.read()
    second = held.find(b"two")
    assert first and second and first.name == second.name
    assert held.salt(first, "") != held.salt(second, "")


def test_keys_need_no_separate_caches_unless_there_is_a_file(tmp_path: Path) -> None:
    held = Keys(tmp_path / "keys.yaml", "single")
    assert not held.separate
    write(tmp_path, entry("team-a", "one"))
    held.read()
    assert held.separate


# The command line


def test_a_new_key_and_its_entry_fit_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for models, opened in (("seville-hotels, granada-hotels", {"seville-hotels", "granada-hotels"}), ("*", None)):
        assert keys.main(["new", "team-a", "--models", models]) == 0
        printed = capsys.readouterr().out
        key = re.search(r"^sk-lora-[A-Za-z0-9_-]{43}$", printed, re.MULTILINE)
        written = re.search(r"^- name.*?\n\n", printed, re.MULTILINE | re.DOTALL)
        assert key and written
        assert printed.count(key.group()) == 1
        file = write(tmp_path, written.group())
        found = Keys(file, None).find(key.group().encode())
        assert found and (found.name, found.models) == ("team-a", opened)
        assert "kubectl -n NS create secret generic serving-keys --from-file=keys.yaml" in printed
        assert keys.main(["check", str(file)]) == 0
        opens = "every model" if opened is None else "granada-hotels, seville-hotels"
        assert capsys.readouterr().out == f"team-a: {opens}\n"


def test_two_new_keys_differ() -> None:
    assert keys.new("a", "x") != keys.new("a", "x")


@pytest.mark.parametrize(("name", "models", "problem"), [
    ("Team A", "x", "name must be 1 to 63 of"), ("team-a", "", "models must be a list"),
    ("team-a", "x,", "models must be a list"), ("team-a", "x,*", "models must be a list"),
    ("team-a", "x" * 257, "models must be a list"),
    ("A", "", "not at the ends\nmodels must be a list")])
def test_a_key_that_no_file_could_hold_is_not_made(name: str, models: str, problem: str,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(["new", name, "--models", models]) == 2
    captured = capsys.readouterr()
    assert problem in captured.err
    assert "sk-lora-" not in captured.out + captured.err


def test_check_names_what_is_wrong_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, entry("team-a", "one").replace("sha256", "sha"))
    assert keys.main(["check", str(file)]) == 2
    assert f"{file}:3: keys.0.sha: unknown key; did you mean `sha256`?" in capsys.readouterr().err
    assert keys.main(["check", str(tmp_path / "none.yaml")]) == 2
    assert keys.main(["check", str(write(tmp_path))]) == 0
    assert "no keys: only the holder of VLLM_API_KEY gets in" in capsys.readouterr().out


def test_check_lists_each_key_with_the_models_that_it_opens_and_the_metrics(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, entry("team-a", "one", f"[b, a, {'x' * 256}]"), entry("admin", "two"),
                 f'- {{name: prometheus, sha256: "{sha256("three")}", metrics: true}}\n')
    assert keys.main(["check", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"team-a: a, b, {'x' * 256}", "admin: every model", "prometheus: /metrics"]


@pytest.mark.parametrize(("arguments", "parts"), [
    ([], ["usage: python -m serving.keys [-h] COMMAND ...", "Make keys for clients", "make a key and its entry",
          "validate a file of keys"]),
    (["new"], ["usage: python -m serving.keys new [-h] --models A,B NAME", "of the key, for people and metrics",
               "the aliases that it may use"]),
    (["check"], ["usage: python -m serving.keys check [-h] FILE", "FILE keys.yaml"])])
def test_help_explains_every_command_and_argument(arguments: list[str], parts: list[str],
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        keys.main([*arguments, "--help"])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert [part for part in parts if part not in printed] == []


@pytest.mark.parametrize("arguments", [
    [], ["new", "team-a"], ["new", "team-a", "--model", "x"], ["check"], ["--hel"], ["check", "--hel"]])
def test_a_command_line_that_lacks_or_abbreviates_something_is_refused(
        arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        keys.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m serving.keys ")


def test_the_command_line_needs_no_package_of_the_server() -> None:
    """People run it on a laptop, from a checkout with the packages of the jobs."""
    script = ("import sys; sys.modules.update(dict.fromkeys(['vllm', 'torch', 'starlette', 'prometheus_client']));"
              "from serving import keys; sys.exit(keys.main(['new', 'a', '--models', 'x']))")
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


# The Deployment


def test_the_deployment_mounts_the_secret_so_that_changes_reach_the_running_pod() -> None:
    deployment = yaml.safe_load((CHECKOUT / "serving" / "deployment.yaml").read_text())
    spec = deployment["spec"]["template"]["spec"]
    volume = next(each for each in spec["volumes"] if "secret" in each)
    assert volume["secret"] == {"secretName": "serving-keys", "optional": True}  # overlays without it work
    container = spec["containers"][0]
    mount = next(each for each in container["volumeMounts"] if each["name"] == volume["name"])
    assert "subPath" not in mount  # the kubelet never updates such a mount
    assert {"name": "KEYS_FILE", "value": f"{mount['mountPath']}/keys.yaml"} in container["env"]
    assert f"{mount['mountPath']}/keys.yaml" == keys.FILE
