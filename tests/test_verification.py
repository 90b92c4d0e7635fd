"""Promises of the checks before an adapter is loaded: a fit one passes, each kind of unfit one is refused by reason."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from jobs.core import artifacts, promotion
from jobs.core.errors import UserError
from jobs.core.pipeline import Pipeline
from jobs.core.plan import FINE_TUNED_VOLUME, Plan
from serving import candidates, lora, untrusted, verification
from serving.candidates import Candidate
from serving.refusal import NotYet, Refused
from serving.served import Served
from tests import build_adapter, build_pipeline, build_signing
from tests.build_signing import Pair, pair

Change = Callable[[Path], object]  # has its way with an adapter's folder before it is published
LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


class World:
    """One pipeline with its volumes, and the server's idea of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.volumes = folder, folder / "volumes"
        self.pipeline, self.plan = self.change()
        self.served = Served(
            pipelines=str(folder / "pipelines"), volumes=str(self.volumes), base_name="builtin:tiny",
            base_model=self.plan.base_model.digest, tokenizer=self.plan.tokenizer.digest,
            base_folder=str(build_adapter.models() / "base"), max_lora_rank=16,
            private_folder=str(folder / "private"))

    def change(self, **changes: Any) -> tuple[Pipeline, Plan]:
        return build_adapter.load(self.folder / "pipelines" / "one", **changes)

    def take(self) -> Path:
        return verification.copy_verified("seville-hotels", self.plan.adapter.digest, self.served, self.modules)

    def try_(self) -> tuple[Path | None, str]:
        """The copy, or None and the reason why it was refused."""
        try:
            return self.take(), ""
        except Refused as refused:
            return None, refused.reason

    def modules(self) -> lora.Modules:
        return modules()


@functools.cache
def modules() -> lora.Modules:
    return lora.linear_modules(build_adapter.models() / "base")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_fit_adapter_is_copied_out_of_everybodys_reach_and_passes(world: World) -> None:
    source = build_adapter.adapter(world.volumes, world.pipeline)
    copy = world.take()
    assert Path(world.served.private_folder) in copy.parents
    assert {p.name for p in copy.iterdir()} == {p.name for p in source.iterdir()}
    shutil.rmtree(source)  # retention, or a lost volume
    verification.verify(copy, world.served, world.modules)


def test_a_signature_is_one_of_the_files_that_an_adapter_may_hold(world: World) -> None:
    source = build_adapter.adapter(world.volumes, world.pipeline)
    (source / "artifact.json.sig").write_text("{}")
    assert "artifact.json.sig" in {p.name for p in world.take().iterdir()}


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensors(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = folder / "adapter_model.safetensors"
        found = load_file(file)
        edit(found)
        save_file(found, file)

    return change


def renamed(old: str, new: str) -> Change:
    return tensors(lambda t: t.update({k.replace(old, new): t.pop(k) for k in list(t) if old in k}))


def filled(value: float, side: str = "B") -> Change:
    return tensors(lambda t: t[LAYER.format(side)].view(-1)[3].fill_(value))


def retensored(side: str, make: Callable[[Any], Any]) -> Change:
    return tensors(lambda t: t.update({LAYER.format(side): make(t[LAYER.format(side)])}))


def every(side: str, make: Callable[[Any], Any]) -> Change:
    return tensors(lambda t: t.update({k: make(v) for k, v in t.items() if f"lora_{side}" in k}))


def scaled(a: float, b: float) -> Change:
    return tensors(lambda t: [v.mul_(a if "lora_A" in k else b) for k, v in t.items()])


def cancelled(found: dict[str, Any]) -> None:
    """Neither A nor B is zero, but their product is: the second half of the ranks undoes what the first does."""
    for key, tensor in found.items():
        half = tensor.shape[0 if "lora_A" in key else 1] // 2
        if "lora_A" in key:
            tensor[half:] = tensor[:half]
        else:
            tensor[:, half:] = -tensor[:, :half]


def text(make: Callable[[str], str | bytes], name: str = "adapter_config.json") -> Change:
    """Change a JSON file as text."""
    def change(folder: Path) -> None:
        file = folder / name
        made = make(file.read_text())
        file.write_bytes(made.encode() if isinstance(made, str) else made)

    return change


def header(make: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header of the weights and leave their bytes as they are."""
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        found = json.loads(content[8:8 + length])
        made = make(found)
        new = made if isinstance(made, bytes) else json.dumps(found).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length:])

    return change


def diagonal(value: float) -> Change:
    """Every A moves an input's first numbers as they are to its ranks, every B those, times `value`, to the output."""
    def change(found: dict[str, Any]) -> None:
        for key, tensor in found.items():
            tensor.zero_()
            tensor.diagonal().fill_(1.0 if "lora_A" in key else value)

    return tensors(change)


def full(a: float, b: float) -> Change:
    """A layer with the same number everywhere: its largest output for inputs of 1 is 32 a 8 b 4."""
    return both(retensored("A", lambda t: t.fill_(a)), retensored("B", lambda t: t.fill_(b)))


def padded(length: int) -> Change:
    """A header of the weights that has this many bytes."""
    return header(lambda h: json.dumps(h).encode().ljust(length))


def dtype(name: str, width: int) -> Change:
    """The weights as numbers of another type, of which torch cannot write some: zeros of `width` bytes each."""
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        content = file.read_bytes()
        found = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
        found.pop("__metadata__", None)
        end = 0
        for each in found.values():
            start, end = end, end + math.prod(each["shape"]) * width
            each.update(dtype=name, data_offsets=[start, end])
        new = json.dumps(found).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + b"\x01" * end)

    return change


def added(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes(b"\x80\x04")


def replaced_by(name: str, make: Callable[[Path], object]) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def directory(name: str) -> Change:
    return replaced_by(name, Path.mkdir)


def link(name: str, target: str) -> Change:
    return replaced_by(name, lambda path: path.symlink_to(target))


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 64)


# Changed before it is published, so that artifact.json agrees with the files: only the later checks can notice.
MADE_WRONG: dict[str, tuple[str, str, Change]] = {
    "a pickle beside the weights": ("files", "adapter_model.bin", added("adapter_model.bin")),
    "a pickle by another name": ("files", "weights", added("weights")),
    "a signature of something else": ("files", "adapter_model.safetensors.sig",
                                      added("adapter_model.safetensors.sig")),
    "no weights": ("files", "adapter_model.safetensors is missing", removed("adapter_model.safetensors")),
    "no config": ("files", "adapter_config.json is missing", removed("adapter_config.json")),
    "empty weights": ("damaged", "not a whole safetensors",
                      lambda f: (f / "adapter_model.safetensors").write_bytes(b"")),
    "truncated weights": ("damaged", "not a whole safetensors", truncated),
    "weights that are no safetensors": ("damaged", "not a whole safetensors",
                                        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")),
    "config that is no JSON": ("config", "not a LoRA config", lambda f: (f / "adapter_config.json").write_text("{")),
    "config that is a list": ("config", "not a LoRA config", lambda f: (f / "adapter_config.json").write_text("[]")),
    "config that says nothing": ("config", "is None", lambda f: (f / "adapter_config.json").write_text("{}")),
    "another method": ("config", "LOHA", config(peft_type="LOHA")),
    "DoRA": ("config", "use_dora", config(use_dora=True)),
    "whole modules": ("config", "modules_to_save", config(modules_to_save=["lm_head"])),
    "a trained bias": ("config", "bias", config(bias="all")),
    "a rank above the server's": ("rank", "rank 32 is above the server's 16", config(r=32)),
    "one module's rank above the server's": ("rank", "rank 32", config(rank_pattern={"q_proj": 32})),
    "rank zero": ("config", "r is 0", config(r=0)),
    "a rank that is no number": ("config", "r is '8'", config(r="8")),
    "a rank other than the weights'": ("shape", "adapter_config.json has rank 4", config(r=4)),
    "NaN": ("values", "NaN", filled(float("nan"))),
    "infinity": ("values", "NaN, infinite", filled(float("-inf"), "A")),
    "infinite in float16": ("values", "huge", filled(1e6)),
    "numbers that are not floats": ("values", "I8", retensored("A", lambda t: t.char())),
    "a layer that does not exist": ("module", "model.layers.9.", renamed("layers.0.", "layers.9.")),
    "a module that does not exist": ("module", "x_proj", renamed("q_proj", "x_proj")),
    "a module that carries no adapter": ("module", "lm_head", renamed("model.layers.0.self_attn.q_proj", "lm_head")),
    "a tensor that is no LoRA": ("module", "not a LoRA weight", renamed("q_proj.lora_A", "q_proj.lora_magnitude")),
    "too few inputs": ("shape", "lora_A", retensored("A", lambda t: t[:, :-1].contiguous())),
    "too many outputs": ("shape", "lora_B", retensored("B", lambda t: t.repeat(2, 1))),
    "transposed": ("shape", "lora_A", retensored("A", lambda t: t.T.contiguous())),
    "not a matrix": ("shape", "lora_B", retensored("B", lambda t: t[None].contiguous())),
    "half a pair": ("shape", "lacks", tensors(lambda t: t.pop(LAYER.format("A")))),
    "no tensors": ("no effect", "changes nothing", tensors(lambda t: t.clear())),
    "every B zero": ("no effect", "changes nothing",
                     tensors(lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])),
    "every A zero": ("no effect", "changes nothing", scaled(0, 1)),
    "every B next to nothing": ("no effect", "changes nothing", scaled(1, 1e-30)),
    "A and B that cancel out": ("no effect", "changes nothing", tensors(cancelled)),
    # vLLM and PEFT match these patterns as regular expressions: this one keeps vLLM's engine busy for hours.
    "a pattern that never ends": ("config", "alpha_pattern", config(alpha_pattern={r"(.|\w|\.)*(?!.|$)": 16})),
    "one module's alpha": ("config", "alpha_pattern", config(alpha_pattern={"q_proj": 1e6})),
    "one module's rank": ("config", "rank_pattern", config(rank_pattern={"q_proj": 8})),
    "a pattern that is a list": ("config", "rank_pattern", config(rank_pattern=["q_proj"])),
    "rank True": ("config", "r is True", config(r=True)),
    "a rank with a fraction": ("config", "r is 8.0", config(r=8.0)),
    "alpha zero": ("config", "lora_alpha", config(lora_alpha=0)),
    "alpha below zero": ("config", "lora_alpha", config(lora_alpha=-32)),
    "alpha NaN": ("config", "lora_alpha", config(lora_alpha=float("nan"))),
    "alpha infinite": ("config", "lora_alpha", config(lora_alpha=float("inf"))),
    "alpha of 400 digits": ("config", "lora_alpha", config(lora_alpha=10**400)),
    "alpha in words": ("config", "lora_alpha", config(lora_alpha="32")),
    "alpha true": ("config", "lora_alpha", config(lora_alpha=True)),
    "no alpha": ("config", "lora_alpha", text(lambda t: t.replace("lora_alpha", "lora_alphabet"))),
    "alpha beyond all bounds": ("values", "infinite", config(lora_alpha=1e30)),
    "another alpha than was asked for": ("config", "pipeline file has alpha 32", config(lora_alpha=33)),
    "another rank than was asked for": ("config", "has r 2; the pipeline file has r 8", both(
        config(r=2), every("A", lambda t: t[:2].contiguous()), every("B", lambda t: t[:, :2].contiguous()))),
    "another scale": ("config", "use_rslora", config(use_rslora=True)),
    "target modules missing": ("config", "target_modules", config(target_modules=None)),
    "target modules none": ("config", "target_modules", config(target_modules=[])),
    "target modules by pattern": ("config", "target_modules", config(target_modules=".*_proj")),
    "target modules of numbers": ("config", "target_modules", config(target_modules=[1])),
    "an unknown target module": ("module", "x_proj", config(target_modules=["q_proj", "x_proj"])),
    "a target module that carries no adapter": ("module", "lm_head", config(target_modules=["q_proj", "lm_head"])),
    "weights of a layer that is no target": ("module", "leaves it out", config(target_modules=["q_proj"])),
    "fewer target modules than were asked for": ("config", "the pipeline file has target modules", both(
        config(target_modules=["q_proj"]), tensors(lambda t: [t.pop(k) for k in list(t) if "q_proj" not in k]))),
    "a layer without weights": ("module", "layers.1.self_attn.v_proj are missing",
                                tensors(lambda t: [t.pop(k) for k in list(t) if "layers.1.self_attn.v_proj" in k])),
    "only some layers": ("config", "layers_to_transform", config(layers_to_transform=0)),
    "all but some modules": ("config", "exclude_modules", config(exclude_modules=["q_proj"])),
    "another initial model": ("config", "init_lora_weights", config(init_lora_weights="pissa")),
    "code to import": ("config", "auto_mapping", config(auto_mapping={"parent_library": "os"})),
    "another task": ("config", "task_type", config(task_type="SEQ_CLS")),
    "an option of the future": ("config", "use_everything", config(use_everything=True)),
    "more dropout than there is": ("config", "lora_dropout", config(lora_dropout=1.5)),
    "no method": ("config", "peft_type", text(lambda t: t.replace("peft_type", "pet_type"))),
    "a dropout that is none": ("config", "lora_dropout", config(lora_dropout="much")),
    "the method in small letters": ("config", "lora", config(peft_type="lora")),
    "a config that begins with a byte order mark": ("config", "not a LoRA config", text(lambda t: "\ufeff" + t)),
    "a config in UTF-16": ("config", "not a LoRA config", text(lambda t: t.encode("utf-16"))),
    "a config in no encoding": ("config", "not a LoRA config", text(lambda t: t.encode() + b"\xff")),
    "a bottomless config": ("config", "not a LoRA config",
                            text(lambda t: t[:-2] + ', "x": ' + "[" * 9999 + "]" * 9999 + "}")),
    "an endless config": ("config", "bytes", text(lambda t: t + " " * 5_000_000)),
    "a config that is a folder": ("damaged", "not a plain file", both(
        lambda folder: (folder / "adapter_config.json").rename(folder / "x.json"), directory("adapter_config.json"))),
    "a folder": ("damaged", "more is not a plain file", directory("more")),
    "more weights": ("files", "new_embeddings", added("new_embeddings.safetensors")),
    "a name that writes to the log": ("files", "one", added("one\n00:00:00 all is well.json")),
    "hundreds of files": ("files", "more than 100", both(*(added(f"{i}.json") for i in range(300)))),
    "a tensor name that writes to the log": ("module", "not a LoRA weight", renamed("q_proj", "x\n00:00:00 is well")),
    "a fused layer": ("module", "qkv_proj", renamed("q_proj", "qkv_proj")),
    "a layer's name in capitals": ("module", "Q_PROJ", renamed("q_proj", "Q_PROJ")),
    "a layer's name in Cyrillic": ("module", "_proj", renamed("v_proj", "\u0475_proj")),
    "a layer's name with a prefix": ("module", "base_model", renamed("base_model.", "base_model.model.base_model.")),
    "adapters with a name of their own": ("module", "lora_A.default", renamed("lora_A.", "lora_A.default.")),
    "no rank at all": ("shape", "lora_A", both(
        every("A", lambda t: t[:0].contiguous()), every("B", lambda t: t[:, :0].contiguous()))),
    "a product that is infinite": ("values", "multiply", scaled(1e4, 1e4)),
    "infinite once it is scaled": ("values", "infinite", filled(6e4)),
    "a product just too large": ("values", "multiply", full(8.0, 8.1)),
    "an effect just too small": ("no effect", "changes nothing", diagonal(2e-10)),
    "a header just too long": ("damaged", "header", padded(2**20 + 1)),
    "numbers of 64 bits": ("values", "F64", every("A", lambda t: t.double())),
    **{f"numbers of the type {name}": ("values", name, dtype(name, width)) for name, width in (
        ("BOOL", 1), ("F8_E4M3", 1), ("F8_E8M0", 1), ("C64", 8), ("U64", 8), ("I32", 4))},
    "numbers of no known type": ("damaged", "not a whole safetensors", dtype("F33", 4)),
    "a header of gigabytes": ("damaged", "header", lambda f: (f / "adapter_model.safetensors").write_bytes(
        (2**33).to_bytes(8, "little") + b"{}")),
    "a header that is hardly ever needed": ("damaged", "header", header(
        lambda h: json.dumps(h).encode() + b" " * 5_000_000)),
    "a bottomless header": ("damaged", "not a whole safetensors", header(
        lambda h: b'{"__metadata__": ' + b"[" * 99_999)),
    "weights that share their bytes": ("damaged", "not a whole safetensors", header(
        lambda h: h[LAYER.format("A")].update(data_offsets=h[LAYER.format("A").replace("q_", "k_")]["data_offsets"]))),
    "weights behind the end": ("damaged", "not a whole safetensors", header(
        lambda h: h[LAYER.format("A")].update(data_offsets=[10**9, 10**9 + 2048]))),
}


@pytest.mark.parametrize("case", MADE_WRONG)
def test_an_adapter_that_was_made_wrong_is_refused_by_reason_and_nothing_of_it_is_left(world: World, case: str) -> None:
    reason, says, change = MADE_WRONG[case]
    build_adapter.adapter(world.volumes, world.pipeline, change)
    with pytest.raises(Refused, match=f"(?s).*{says}") as caught:
        world.take()
    assert caught.value.reason == reason
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 1000
    assert not list(Path(world.served.private_folder).glob("*/*"))


def manifest(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        file = folder / "artifact.json"
        found = json.loads(file.read_text())
        edit(found)
        file.write_text(json.dumps(found))

    return change


BOTTOMLESS = text(lambda t: t[:-2] + ', "x": ' + "[" * 9999 + "]" * 9999 + "}", "artifact.json")


def sparse(name: str) -> Change:
    """Ten terabytes that take no room."""
    def change(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, 10 * 2**40)

    return change


def pipe(name: str) -> Change:
    return replaced_by(name, os.mkfifo)


def deep(folder: Path) -> None:
    """Folders in folders, deeper than a path can be long."""
    with contextlib.chdir(folder):
        for _ in range(20):
            Path("folder" * 40).mkdir()
            os.chdir("folder" * 40)


def listens(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(folder):  # a socket's path must be short
        listener.bind("x.json")


# Changed after it was published: what lies on the volume is not what artifact.json says, or artifact.json is not ours.
TAMPERED: dict[str, tuple[str, str, Change]] = {
    "a pipe": ("damaged", "not a plain file", pipe("x.json")),
    "a pipe for the config": ("damaged", "not a plain file", pipe("adapter_config.json")),
    "a pipe for the manifest": ("damaged", "not a plain file", pipe("artifact.json")),
    "folders without end": ("damaged", "folder is not a plain file", deep),
    "a socket": ("damaged", "not a plain file", listens),
    "a link to what never ends": ("damaged", "not a plain file", link("x.json", "/dev/zero")),
    "a link to a folder": ("damaged", "not a plain file", link("x.json", "/")),
    "a link to nothing": ("damaged", "not a plain file", link("x.json", "nothing")),
    "ten terabytes of JSON": ("files", "too large", sparse("x.json")),
    "ten terabytes of weights": ("files", "too large", sparse("adapter_model.safetensors")),
    "ten terabytes of manifest": ("files", "too large", sparse("artifact.json")),
    "a name in no encoding": ("files", "only", added("\udcff.json")),
    "no manifest": ("damaged", "missing", removed("artifact.json")),
    "a manifest that is no JSON": ("damaged", "damaged", text(lambda t: "{", "artifact.json")),
    "a manifest that is a list": ("damaged", "damaged", text(lambda t: "[]", "artifact.json")),
    "a bottomless manifest": ("damaged", "damaged", BOTTOMLESS),
    "an endless manifest": ("damaged", "bytes", text(lambda t: t + " " * 5_000_000, "artifact.json")),
    "inputs as pairs": ("damaged", "artifact", manifest(lambda m: m.update(inputs=list(m["inputs"].items())))),
    "a spec as pairs": ("damaged", "artifact", manifest(lambda m: m.update(spec=list(m["spec"].items())))),
    "no inputs": ("damaged", "damaged", manifest(lambda m: m.update(inputs=None))),
    "no digest": ("damaged", "'digest'", manifest(lambda m: m.pop("digest"))),
    "no files": ("damaged", "not listed", manifest(lambda m: m.update(files=[]))),
    "files by number": ("damaged", "damaged", manifest(lambda m: m["files"][0].update(path=1))),
    "files by list": ("damaged", "damaged", manifest(lambda m: m["files"][0].update(path=[]))),
    "a file elsewhere": ("damaged", "is missing", manifest(lambda m: m["files"][0].update(path="../../x"))),
    "a file name that writes to the log": ("damaged", "is missing", manifest(lambda m: m["files"].append(
        {"path": "\n00:00:00 all is well\u2028\x1b[2J\udcff", "size": 0, "sha256": ""}))),
    "an artifact of another kind": ("damaged", "describes", manifest(lambda m: m.update(kind="scores"))),
    "an artifact made of other things": ("damaged", "describes", manifest(lambda m: m["inputs"].update(dataset="0"))),
}


@pytest.mark.timeout(60)  # or a pipe is waited for
@pytest.mark.parametrize("case", TAMPERED)
def test_an_adapter_that_was_tampered_with_is_refused_in_one_line_and_nothing_of_it_is_left(
        world: World, case: str) -> None:
    reason, says, change = TAMPERED[case]
    folder = build_adapter.adapter(world.volumes, world.pipeline)
    change(folder)
    untrusted.state_of(folder)  # by which it is noticed when the folder changes
    with pytest.raises(Refused, match=f".*{says}") as caught:
        world.take()
    assert caught.value.reason == reason
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 1000
    assert not list(Path(world.served.private_folder).glob("*/*"))


def test_an_artifact_of_another_kind_is_refused_even_if_its_name_fits(world: World) -> None:
    folder = build_adapter.adapter(world.volumes, world.pipeline)
    manifest(lambda m: m.update(kind="scores", digest=artifacts.digest_of("scores", m["spec"], m["inputs"])))(folder)
    digest = json.loads((folder / "artifact.json").read_text())["digest"]
    folder.rename(folder.with_name(digest))
    with pytest.raises(Refused, match="is an artifact of kind 'scores', not adapter") as caught:
        verification.copy_verified("seville-hotels", digest, world.served, world.modules)
    assert caught.value.reason == "damaged"


def test_a_refusal_points_at_the_files_on_the_volume_and_not_at_a_copy_that_is_gone(world: World) -> None:
    folder = build_adapter.adapter(world.volumes, world.pipeline)
    (folder / "README.md").unlink()
    with pytest.raises(Refused, match=r"README\.md is missing.* Move .* away") as caught:
        world.take()
    assert str(folder) in str(caught.value)
    assert world.served.private_folder not in str(caught.value)


def test_a_file_that_is_replaced_by_a_pipe_at_the_last_moment_is_not_waited_for(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_adapter.adapter(world.volumes, world.pipeline)
    plain = (folder / "adapter_config.json").lstat()
    pipe("adapter_config.json")(folder)
    monkeypatch.setattr(Path, "lstat", lambda _: plain)
    with pytest.raises(Refused) as caught:
        world.take()
    assert caught.value.reason in ("config", "damaged")


def test_a_file_that_is_replaced_by_a_link_at_the_last_moment_is_not_followed(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_adapter.adapter(world.volumes, world.pipeline)
    file = folder / "adapter_config.json"
    plain = file.lstat()
    shutil.copy(file, world.folder / "elsewhere.json")  # the same bytes: only the link is wrong
    link("adapter_config.json", str(world.folder / "elsewhere.json"))(folder)
    monkeypatch.setattr(Path, "lstat", lambda _: plain)
    with pytest.raises(OSError) as caught:
        world.take()
    assert caught.value.errno == errno.ELOOP
    assert not list(Path(world.served.private_folder).glob("*/*"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_volume_that_cannot_be_read_now_is_no_refusal(
        world: World, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    build_adapter.promote(world.volumes, world.pipeline)
    opens = io.open

    def fails(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).startswith(str(world.volumes)):
            raise OSError(number, "cannot be read", str(file))
        return opens(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", fails)  # behind Path.open
    monkeypatch.setattr(os, "open", lambda file, *args: fails(file))
    for look in (world.take, lambda: verification.check_gate(wanted(world), "seville-hotels", world.volumes)):
        with pytest.raises(OSError, match="cannot be read"):
            look()


UP_TO_THE_LIMIT: dict[str, Change] = {
    "large values": both(scaled(1, 1e-6), filled(65504.0, "A")),
    "a large product": full(8.0, 7.9),
    "a small effect": diagonal(4e-9),
    "a long header": padded(2**20),
    "large values that the scale makes larger": filled(1000.0),
}


@pytest.mark.parametrize("case", UP_TO_THE_LIMIT)
def test_an_adapter_within_a_limit_passes(world: World, case: str) -> None:
    build_adapter.adapter(world.volumes, world.pipeline, UP_TO_THE_LIMIT[case])
    world.take()


def test_an_adapter_of_the_servers_own_rank_passes(world: World) -> None:
    world.served = replace(world.served, max_lora_rank=8)
    build_adapter.adapter(world.volumes, world.pipeline)
    world.take()


def test_an_adapter_may_be_as_large_as_the_largest_rank_makes_it_and_no_larger(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.pipeline, world.plan = world.change(training__lora__r=16)
    folder = build_adapter.adapter(world.volumes, world.pipeline)
    weights = sum(4 * 16 * (inner + outer) for inner, outer in modules().values())
    rest = sum(file.stat().st_size for file in folder.iterdir()) - weights
    monkeypatch.setattr(verification, "LARGEST_REST", rest)
    world.take()
    monkeypatch.setattr(verification, "LARGEST_REST", rest - 1)
    assert world.try_() == (None, "files")


def test_an_artifact_may_have_a_hundred_files_and_no_more(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i}.json").touch()
    assert len(untrusted.plain_files(tmp_path)) == 100
    (tmp_path / "100.json").touch()
    with pytest.raises(Refused, match="more than 100 files") as caught:
        untrusted.plain_files(tmp_path)
    assert caught.value.reason == "files"


@pytest.mark.parametrize("desired", [None, {}, {"r": 8, "alpha": 32}, {"r": 8, "alpha": 32, "target_modules": None}])
def test_a_manifest_without_the_settings_of_its_lora_is_damaged(desired: object) -> None:
    with pytest.raises(Refused, match="artifact.json lacks the LoRA settings") as caught:
        lora.check_desired(lora.LoraConfig(8, 32, frozenset()), desired, modules())
    assert caught.value.reason == "damaged"


def test_a_base_model_without_lora_in_vllm_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    with pytest.raises(UserError, match=f"(?s){tmp_path}.*GPT2"):
        lora.linear_modules(tmp_path)


@pytest.mark.parametrize("type_", ["float16", "bfloat16"])
def test_weights_of_16_bits_pass(world: World, type_: str) -> None:
    import torch

    build_adapter.adapter(world.volumes, world.pipeline,
                          tensors(lambda t: t.update({k: v.to(getattr(torch, type_)) for k, v in t.items()})))
    world.take()


def test_an_adapter_of_some_layers_passes_if_they_were_asked_for(world: World) -> None:
    world.pipeline, world.plan = world.change(training__lora__target_modules=["q_proj", "v_proj"])
    build_adapter.adapter(world.volumes, world.pipeline)
    world.take()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_missing_or_extra_file_is_refused(world: World, data: st.DataObject) -> None:
    folder = good(world)
    file = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.name != "artifact.json")))
    match data.draw(st.sampled_from(["flip", "remove", "truncate", "add", "link"])):
        case "flip":
            content = bytearray(file.read_bytes())
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            file.write_bytes(content)
        case "remove":
            file.unlink()
        case "truncate":
            os.truncate(file, data.draw(st.integers(0, file.stat().st_size - 1)))
        case "add":
            (folder / "more.json").write_text("{}")
        case "link":
            file.rename(world.folder / "elsewhere")
            file.symlink_to(world.folder / "elsewhere")
    with pytest.raises(Refused) as caught:
        world.take()
    assert caught.value.reason == "damaged"


def good(world: World) -> Path:
    """The adapter's folder, with all files as they were published."""
    folder = world.plan.adapter.path(world.volumes)
    if not (world.folder / "good").exists():
        build_adapter.adapter(world.volumes, world.pipeline)
        shutil.copytree(folder, world.folder / "good")
    shutil.rmtree(folder)
    shutil.copytree(world.folder / "good", folder)
    return folder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_changed_anywhere_are_refused_or_were_bytes_that_nobody_reads(world: World, data: st.DataObject) -> None:
    folder = good(world)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = file.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 64)))
    changed = content[:start] + data.draw(st.binary(max_size=64)) + content[end:]
    file.write_bytes(changed)
    copy, reason = world.try_()
    if copy is None:
        assert reason == "damaged"
        return
    # The dates and versions in artifact.json: nothing depends on them.
    before, after = (json.loads((each / "artifact.json").read_text()) for each in (world.folder / "good", copy))
    for facts in (before, after):
        for key in set(facts) - {"kind", "digest", "spec", "inputs", "files"}:
            del facts[key]
    assert before == after
    assert all(each.read_bytes() == (copy / each.name).read_bytes()
               for each in (world.folder / "good").iterdir() if each.name != "artifact.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([8, 32, "q_proj"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.just("q_proj"), inner,
                                                                max_size=3), max_leaves=5)


def random_change(data: st.DataObject, folder: Path) -> None:
    """Change something about the weights or the config, and keep both whole files."""
    import torch

    def weights(edit: Callable[[dict[str, Any], str], object]) -> Change:
        return tensors(lambda t: edit(t, data.draw(st.sampled_from(sorted(t)))) if t else None)

    def move(t: dict[str, Any], key: str, new: str) -> None:
        t[new] = t.pop(key)

    def poison(t: dict[str, Any], key: str) -> None:
        if t[key].is_floating_point() and t[key].numel():
            at = data.draw(st.integers(0, t[key].numel() - 1))
            t[key].reshape(-1)[at] = data.draw(st.floats(width=32) | st.sampled_from([1e30, -1e5, 6e4]))

    kinds: dict[str, Change] = {
        "config": lambda f: config(**{data.draw(st.sampled_from(sorted(json.loads(
            (f / "adapter_config.json").read_text()))) | st.text(max_size=8)): data.draw(JSON)})(f),
        "forget": text(lambda t: json.dumps({k: v for gone in [data.draw(st.sampled_from(sorted(json.loads(t))))]
                                             for k, v in json.loads(t).items() if k != gone})),
        "drop": weights(lambda t, key: t.pop(key)),
        "drop a pair": weights(lambda t, key: [t.pop(k, None) for k in (key, key.replace("_A.", "_B."),
                                                                        key.replace("_B.", "_A."))]),
        "rename": weights(lambda t, key: move(t, key, data.draw(st.sampled_from([
            key.replace("layers.0", "layers.1"), key.replace("_A", "_B"), key.upper(), key[5:], key + ".weight",
            key.replace("q_proj", "k_proj"), key.replace("gate", "up")]) | st.text(max_size=8)))),
        "swap": weights(lambda t, key: (other := data.draw(st.sampled_from(sorted(t))), t.update(
            {key: t[other].clone(), other: t[key].clone()}))),
        "reshape": weights(lambda t, key: t.update({key: data.draw(st.sampled_from([
            lambda v: v.transpose(0, -1), lambda v: v[:-1], lambda v: v[..., :-1], lambda v: v[None],
            lambda v: v.reshape(-1), lambda v: torch.cat([v, v]), lambda v: v[:0]]))(t[key]).contiguous()})),
        "retype": weights(lambda t, key: t.update({key: t[key].to(getattr(torch, data.draw(st.sampled_from(
            ["float64", "float16", "bfloat16", "int8", "bool"]))))})),
        "poison": weights(poison),
        "scale": tensors(lambda t: [t.update({k: v * 10.0**exponent})
                                    for exponent in [data.draw(st.integers(-45, 38))]
                                    for k, v in t.items() if v.is_floating_point()]),
        "zero": weights(lambda t, key: t[key].zero_()),
    }
    for kind in data.draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=3)):
        kinds[kind](folder)


@functools.cache
def base() -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(build_adapter.models() / "base").eval()


def harm(folder: Path) -> str:
    """What is wrong with an adapter once PEFT applied it, in words; empty if nothing is."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    options = json.loads((folder / "adapter_config.json").read_text())
    # vLLM knows a few of the options. What is unset is unset for PEFT, however it is written.
    known = {k: v for k, v in options.items() if k in vars(LoraConfig()) and not lora._is_unset(v)}
    prompt = torch.arange(1, 65)[None]
    with torch.no_grad():
        before = base()(prompt).logits
        adapted = PeftModel.from_pretrained(base(), folder, config=LoraConfig(**known))
        try:
            after = adapted(prompt).logits
            applied = get_peft_model_state_dict(adapted)
        finally:
            adapted.unload()
    if not torch.isfinite(after).all():
        return "its probabilities are not finite"
    if torch.equal(before, after):
        return "it changes nothing"
    given = load_file(folder / "adapter_model.safetensors")
    return "" if applied.keys() == given.keys() else "PEFT applies other weights than there are"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_refused_or_harmless_even_if_the_manifest_agrees(world: World, data: st.DataObject) -> None:
    folder = good(world)
    random_change(data, folder)
    manifest(lambda m: m.update(files=artifacts.listing(folder)))(folder)
    copy, reason = world.try_()
    event(reason or "passed")
    assert harm(copy) == "" if copy else reason in ("config", "rank", "module", "shape", "values", "no effect")


def test_harm_is_seen_where_there_is_some(world: World) -> None:
    good_one = good(world)
    assert harm(good_one) == ""
    for change, seen in ((filled(float("nan")), "finite"), (scaled(1, 0), "nothing"),
                         (config(target_modules=["q_proj"]), "other weights")):
        change(good(world))
        assert seen in harm(good_one)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_a_manifest_it_is_refused_or_says_the_same(world: World, data: st.DataObject) -> None:
    folder = good(world)
    before = json.loads((folder / "artifact.json").read_text())

    def edit(found: dict[str, Any]) -> None:
        place: Any = found
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
                break
            place = place[key]
        place[key] = data.draw(JSON)

    manifest(edit)(folder)
    copy, reason = world.try_()
    if copy is None:
        assert reason == "damaged"
    else:
        after = json.loads((copy / "artifact.json").read_text())
        assert all(before[key] == after[key] for key in ("kind", "digest", "spec", "inputs", "files"))


@pytest.mark.parametrize("key", ["base_model", "tokenizer"])
def test_an_adapter_of_another_base_or_tokenizer_is_refused(world: World, key: str) -> None:
    build_adapter.adapter(world.volumes, world.pipeline)
    world.served = Served(**{**vars(world.served), key: "0" * 16})
    with pytest.raises(Refused, match=f"was trained on {key} .* this server serves 0000") as caught:
        world.take()
    assert caught.value.reason == "base"


@pytest.mark.parametrize("value", ["{}", '{"enable_thinking":true}'])
def test_an_adapter_that_was_trained_in_another_chat_format_is_refused(world: World, value: str) -> None:
    template = {"enable_thinking": False}
    adapter = build_adapter.adapter(world.volumes, build_pipeline.build(
        base_model={"source": "builtin:tiny"}, chat_template=template))
    manifest = json.loads((adapter / "artifact.json").read_text())
    verification.check_template(manifest, Served(**{**vars(world.served), "template": '{"enable_thinking":false}'}))
    with pytest.raises(Refused, match=r'trained with chat_template \{"enable_thinking":false\}') as caught:
        verification.check_template(manifest, Served(**{**vars(world.served), "template": value}))
    assert caught.value.reason == "base"


@pytest.mark.parametrize("spec", [{"chat_template": {"a": float("nan")}}, {"chat_template": {"a": "\ud800"}},
                                  {"chat_template": []}, {"chat_template": None}])
def test_arguments_that_no_environment_has_are_no_format(world: World, spec: Any) -> None:
    with pytest.raises(Refused, match="it was trained with chat_template"):
        verification.check_template({"spec": spec}, world.served)


def wanted(world: World) -> Candidate:
    return candidates.desired(world.pipeline, world.volumes)


def test_only_an_adapter_whose_own_evaluation_passed_goes_through_the_gate(world: World) -> None:
    build_adapter.evaluation(world.volumes, world.pipeline)
    verification.check_gate(wanted(world), "seville-hotels", world.volumes)
    for other in ("0" * 16, "../../elsewhere"):
        with pytest.raises(Refused, match=r"is about seville-hotels@"):
            verification.check_gate(Candidate(other, world.plan.evaluation.digest), "seville-hotels", world.volumes)
    with pytest.raises(Refused, match=r"not another-name@"):
        verification.check_gate(wanted(world), "another-name", world.volumes)


def test_a_failed_gate_is_refused(world: World) -> None:
    build_adapter.evaluation(world.volumes, world.pipeline, passed=False)
    with pytest.raises(Refused, match="rejected seville-hotels@") as caught:
        verification.check_gate(wanted(world), "seville-hotels", world.volumes)
    assert caught.value.reason == "gate"


def verdict(text: str) -> Change:
    return lambda folder: (folder / "evaluation.json").write_text(text)


@pytest.mark.parametrize("passed", ["true", 1, 1.0, [True], {"passed": True}, None])
def test_only_true_is_a_passed_gate(world: World, passed: object) -> None:
    build_adapter.evaluation(world.volumes, world.pipeline, passed=passed)
    with pytest.raises(Refused, match="rejected") as caught:
        verification.check_gate(wanted(world), "seville-hotels", world.volumes)
    assert caught.value.reason == "gate"


UNREADABLE: dict[str, tuple[Change | None, Change | None]] = {  # before and after it is published
    "no verdict": (removed("evaluation.json"), None),
    "a verdict that is a list": (verdict('[{"passed": true}]'), None),
    "a verdict that is no JSON": (verdict("passed"), None),
    "a bottomless verdict": (verdict("[" * 99_999), None),
    "an endless verdict": (verdict("{}" + " " * 5_000_000), None),
    "a verdict about nothing": (verdict('{"passed": true}'), None),
    "a verdict about a word": (verdict('{"passed": true, "adapter": "seville-hotels"}'), None),
    "a verdict about another adapter": (verdict('{"passed": true, "adapter": {"digest": "0000000000000000"}}'), None),
    "a verdict that is not said": (text(lambda t: t.replace("passed", "past"), "evaluation.json"), None),
    "a verdict in a folder": (directory("evaluation.json"), None),
    "folders without end": (None, deep),
    "a pipe": (None, pipe("evaluation.json")),
    "a pipe for the manifest": (None, pipe("artifact.json")),
    "a manifest by link": (None, link("artifact.json", "/dev/zero")),
    "a bottomless manifest": (None, BOTTOMLESS),
    "inputs as pairs": (None, manifest(lambda m: m.update(inputs=list(m["inputs"].items())))),
    "a spec as pairs": (None, manifest(lambda m: m.update(spec=list(m["spec"].items())))),
    "files by number": (None, manifest(lambda m: m["files"][0].update(path=1))),
}


@pytest.mark.timeout(60)  # or a pipe is waited for
@pytest.mark.parametrize("case", UNREADABLE)
def test_an_evaluation_that_cannot_be_trusted_is_refused(world: World, case: str) -> None:
    before, after = UNREADABLE[case]
    folder = build_adapter.evaluation(world.volumes, world.pipeline, change=before)
    if after:
        after(folder)
    with pytest.raises(Refused) as caught:
        verification.check_gate(wanted(world), "seville-hotels", world.volumes)
    assert caught.value.reason == "damaged"
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 1000


def test_an_evaluation_that_takes_hours_to_read_is_refused(world: World) -> None:
    sparse("x.json")(build_adapter.evaluation(world.volumes, world.pipeline))
    with pytest.raises(Refused, match=r"has 11\.00 TB; no evaluation is that large") as caught:
        verification.check_gate(wanted(world), "seville-hotels", world.volumes)
    assert caught.value.reason == "files"


def test_a_verdict_that_somebody_edited_is_refused(world: World) -> None:
    folder = build_adapter.evaluation(world.volumes, world.pipeline, passed=False)
    file = folder / "evaluation.json"
    file.write_text(file.read_text().replace("false", "true"))
    with pytest.raises(Refused, match=r"evaluation\.json was changed") as caught:
        verification.check_gate(wanted(world), "seville-hotels", world.volumes)
    assert caught.value.reason == "damaged"


def test_the_promotion_names_the_last_promoted_adapter_even_when_the_file_asks_for_another(world: World) -> None:
    with pytest.raises(NotYet, match="no adapter was promoted as seville-hotels yet"):
        candidates.promoted("seville-hotels", world.volumes)
    build_adapter.promote(world.volumes, world.pipeline)
    changed, changed_plan = world.change(training__seed=1)
    assert candidates.promoted("seville-hotels", world.volumes) == wanted(world)
    desired = candidates.desired(changed, world.volumes).adapter
    assert desired == changed_plan.adapter.digest != world.plan.adapter.digest


@pytest.mark.parametrize("digest", ["../../base-model/base-model/x", "", "0" * 15, "0" * 16 + "\n", "ABCDEFABCDEFABCD"])
def test_a_promotion_cannot_name_a_path(world: World, digest: str) -> None:
    with pytest.raises(Refused, match="is not a digest"):
        candidates.adapter_folder(digest, world.volumes)
    volume = world.volumes / FINE_TUNED_VOLUME
    promotion.promote(volume, "seville-hotels", digest, digest)
    with pytest.raises(Refused, match="is not a digest"):
        verification.check_gate(candidates.promoted("seville-hotels", world.volumes), "seville-hotels", world.volumes)


@pytest.mark.parametrize("damage", [
    lambda file: file.write_text("{"), lambda file: file.write_text("[" * 100_000), os.mkfifo, Path.mkdir])
def test_a_damaged_promotion_is_refused_and_neither_a_crash_nor_waited_for(world: World, damage: Change) -> None:
    (world.volumes / FINE_TUNED_VOLUME / "promoted").mkdir(parents=True)
    damage(world.volumes / FINE_TUNED_VOLUME / "promoted" / "seville-hotels")
    with pytest.raises(Refused, match="damaged"):
        candidates.promoted("seville-hotels", world.volumes)


def test_a_folders_signature_changes_when_any_file_does_and_says_when_it_is_absent(world: World) -> None:
    with pytest.raises(NotYet, match=r"adapter [0-9a-f]{16} is not there yet"):
        untrusted.state_of(world.plan.adapter.path(world.volumes))
    folder = build_adapter.adapter(world.volumes, world.pipeline)
    before = untrusted.state_of(folder)
    assert untrusted.state_of(folder) == before
    file = folder / "adapter_config.json"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    assert untrusted.state_of(folder) != before


def test_what_is_served_survives_the_environment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in world.served.to_environment().items():
        monkeypatch.setenv(key, value)
    assert Served.from_environment() == world.served


# --- signatures -------------------------------------------------------------------------------------------------------

KEYS = (pair("one").public, pair("two").public)


def refused_look(world: World, kind: str) -> str:
    """The reason why the adapter or its evaluation is refused; empty if it is not."""
    try:
        if kind == "adapter":
            verification.copy_verified("seville-hotels", world.plan.adapter.digest, world.served, world.modules, KEYS)
        else:
            verification.check_gate(wanted(world), "seville-hotels", world.volumes, KEYS)
            verification.read_proof(world.plan.evaluation.path(world.volumes), KEYS)
    except Refused as refused:
        return refused.reason
    return ""


def signed_folder(world: World, kind: str, keys: Pair | None = None) -> Path:
    """The folder of a signed adapter, or of its evaluation."""
    build_adapter.promote(world.volumes, world.pipeline)
    build_signing.sign_all(world.volumes, keys or pair("one"))
    spec = world.plan.adapter if kind == "adapter" else world.plan.evaluation
    return spec.path(world.volumes)


every_kind = pytest.mark.parametrize("kind", ["adapter", "evaluation"])


@every_kind
@pytest.mark.parametrize("key", ["one", "two"])
def test_what_is_signed_by_any_trusted_key_is_accepted(world: World, kind: str, key: str) -> None:
    """While keys are changed, both are trusted."""
    signed_folder(world, kind, pair(key))
    assert refused_look(world, kind) == ""


def test_an_adapter_and_its_evaluation_that_were_forged_together_are_refused(world: World) -> None:
    """By one who can write to the volume and has no key: both are whole, and about each other."""
    build_adapter.promote(world.volumes, world.pipeline)
    verification.check_gate(wanted(world), "seville-hotels", world.volumes)
    assert world.take()
    assert (refused_look(world, "adapter"), refused_look(world, "evaluation")) == ("signature", "signature")
    build_signing.sign_all(world.volumes, pair("a forger's"))
    assert (refused_look(world, "adapter"), refused_look(world, "evaluation")) == ("signature", "signature")


@pytest.mark.parametrize(("kind", "name"), [
    ("adapter", "adapter_model.safetensors"), ("adapter", "adapter_config.json"),
    ("evaluation", "evaluation.json"), ("evaluation", "proof.json")])
def test_every_file_is_signed(world: World, kind: str, name: str) -> None:
    folder = signed_folder(world, kind)
    build_signing.tamper(folder, name)
    assert artifacts.read(folder)
    assert refused_look(world, kind) == "signature"


@every_kind
def test_no_file_can_be_added_or_taken_away(world: World, kind: str) -> None:
    folder = signed_folder(world, kind)
    (folder / "more.json").write_text("{}")
    build_signing.tamper(folder, "more.json")
    assert refused_look(world, kind) == "signature"


@every_kind
def test_the_signature_of_another_artifact_is_refused(world: World, kind: str) -> None:
    folder = signed_folder(world, kind)
    other = (world.plan.evaluation if kind == "adapter" else world.plan.adapter).path(world.volumes)
    shutil.copyfile(other / artifacts.SIGNATURE, folder / artifacts.SIGNATURE)
    assert refused_look(world, kind) == "signature"


WRONG_SIGNATURES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing": ("signature", lambda _: None),
    "empty": ("signature", lambda file: file.touch()),
    "garbled": ("signature", lambda file: file.write_bytes(b"\x00\xff" * 50)),
    "huge": ("signature", lambda file: file.write_bytes(b"[" * 200_000)),
    "a pipe": ("damaged", os.mkfifo),
    "a folder": ("damaged", lambda file: file.mkdir()),
    "a link": ("damaged", lambda file: file.symlink_to("/etc/passwd")),
}


@every_kind
@pytest.mark.parametrize("name", list(WRONG_SIGNATURES))
def test_what_stands_in_the_place_of_a_signature_is_refused_at_once(world: World, kind: str, name: str) -> None:
    reason, put = WRONG_SIGNATURES[name]
    file = signed_folder(world, kind) / artifacts.SIGNATURE
    file.unlink()
    put(file)
    assert refused_look(world, kind) == reason


def test_a_base_model_that_was_changed_since_the_training_is_refused(world: World) -> None:
    """It is not signed itself; the signed adapter says what it was trained on."""
    build_adapter.base(world.volumes, world.plan)
    base = world.plan.base_model.path(world.volumes)
    world.served = replace(world.served, base_folder=str(base))
    folder = signed_folder(world, "adapter")
    manifest = json.loads((folder / "artifact.json").read_text())
    manifest["about"]["read"] = {"base_model": artifacts.content_digest(artifacts.read(base).manifest)}
    (folder / "artifact.json").write_text(json.dumps(manifest))
    build_signing.sign_all(world.volumes, pair())
    assert refused_look(world, "adapter") == ""
    build_signing.tamper(base, "config.json")
    assert refused_look(world, "adapter") == "base"
    (base / "artifact.json").write_text("{}")
    assert refused_look(world, "adapter") == "base"
