"""Promises of the checks before an adapter is loaded: a fit one passes, each kind of unfit one is refused by reason."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import promotion
from jobs.pipeline import Pipeline
from jobs.plan import FINE_TUNED_VOLUME, Plan
from serving import adapters
from serving.adapters import NotYet, Refused, Served, Wanted
from tests import build_adapter

Change = Callable[[Path], object]  # has its way with an adapter's folder before it is published
LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


class World:
    """One pipeline with its volumes, and the server's idea of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.volumes = folder, folder / "volumes"
        self.pipeline, self.plan = self.change()
        build_adapter.base(self.volumes, self.plan)
        self.served = Served(
            pipelines=str(folder / "pipelines"), volumes=str(self.volumes), base_name="builtin:tiny",
            base_model=self.plan.base_model.digest, tokenizer=self.plan.tokenizer.digest,
            base_folder=str(self.plan.base_model.path(self.volumes)), max_lora_rank=16,
            private_folder=str(folder / "private"))

    def change(self, **changes: Any) -> tuple[Pipeline, Plan]:
        return build_adapter.load(self.folder / "pipelines" / "one", **changes)

    def take(self) -> Path:
        return adapters.take("seville-hotels", self.plan.adapter.digest, self.served, self.modules)

    def modules(self) -> adapters.Modules:
        return adapters.linear_modules(Path(self.served.base_folder))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_fit_adapter_is_copied_out_of_everybodys_reach_and_passes(world: World) -> None:
    source = build_adapter.adapter(world.volumes, world.pipeline)
    copy = world.take()
    assert Path(world.served.private_folder) in copy.parents
    assert {p.name for p in copy.iterdir()} == {p.name for p in source.iterdir()}
    shutil.rmtree(source)  # retention, or a lost volume
    adapters.verify(copy, world.served, world.modules)


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


def replaced(side: str, make: Callable[[Any], Any]) -> Change:
    return tensors(lambda t: t.update({LAYER.format(side): make(t[LAYER.format(side)])}))


def added(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes(b"\x80\x04")


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 64)


# Changed before it is published, so that artifact.json agrees with the files: only the later checks can notice.
MADE_WRONG: dict[str, tuple[str, str, Change]] = {
    "a pickle beside the weights": ("files", "adapter_model.bin", added("adapter_model.bin")),
    "a pickle by another name": ("files", "weights", added("weights")),
    "no weights": ("files", "adapter_model.safetensors is missing", removed("adapter_model.safetensors")),
    "no config": ("files", "adapter_config.json is missing", removed("adapter_config.json")),
    "truncated weights": ("damaged", "not a whole safetensors", truncated),
    "weights that are no safetensors": ("damaged", "not a whole safetensors",
                                        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")),
    "config that is no JSON": ("config", "not a LoRA config", lambda f: (f / "adapter_config.json").write_text("{")),
    "config that is a list": ("config", "not a LoRA config", lambda f: (f / "adapter_config.json").write_text("[]")),
    "another method": ("config", "LOHA", config(peft_type="LOHA")),
    "DoRA": ("config", "use_dora", config(use_dora=True)),
    "whole modules": ("config", "modules_to_save", config(modules_to_save=["lm_head"])),
    "a trained bias": ("config", "bias", config(bias="all")),
    "a rank above the server's": ("rank", "rank 32 is above the server's 16", config(r=32)),
    "one module's rank above the server's": ("rank", "rank 32", config(rank_pattern={"q_proj": 32})),
    "rank zero": ("config", "not ranks", config(r=0)),
    "a rank that is no number": ("config", "not ranks", config(r="8")),
    "a rank other than the weights'": ("shape", "adapter_config.json says 4", config(r=4)),
    "NaN": ("values", "NaN", filled(float("nan"))),
    "infinity": ("values", "NaN, infinite", filled(float("-inf"), "A")),
    "infinite in float16": ("values", "huge", filled(1e6)),
    "numbers that are not floats": ("values", "int8", replaced("A", lambda t: t.char())),
    "a layer that does not exist": ("module", "model.layers.9.", renamed("layers.0.", "layers.9.")),
    "a module that does not exist": ("module", "x_proj", renamed("q_proj", "x_proj")),
    "a module that carries no adapter": ("module", "lm_head", renamed("model.layers.0.self_attn.q_proj", "lm_head")),
    "a tensor that is no LoRA": ("module", "not a LoRA weight", renamed("q_proj.lora_A", "q_proj.lora_magnitude")),
    "too few inputs": ("shape", "lora_A", replaced("A", lambda t: t[:, :-1].contiguous())),
    "too many outputs": ("shape", "lora_B", replaced("B", lambda t: t.repeat(2, 1))),
    "transposed": ("shape", "lora_A", replaced("A", lambda t: t.T.contiguous())),
    "not a matrix": ("shape", "lora_B", replaced("B", lambda t: t[None].contiguous())),
    "half a pair": ("shape", "lacks", tensors(lambda t: t.pop(LAYER.format("A")))),
    "no tensors": ("no effect", "changes nothing", tensors(lambda t: t.clear())),
    "every B zero": ("no effect", "changes nothing",
                     tensors(lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])),
}


@pytest.mark.parametrize("case", MADE_WRONG)
def test_an_adapter_that_was_made_wrong_is_refused_by_reason_and_nothing_of_it_is_left(world: World, case: str) -> None:
    reason, says, change = MADE_WRONG[case]
    build_adapter.adapter(world.volumes, world.pipeline, change)
    with pytest.raises(Refused, match=f"(?s).*{says}") as caught:
        world.take()
    assert caught.value.reason == reason
    assert not list(Path(world.served.private_folder).glob("*/*"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_missing_or_extra_file_is_refused(world: World, data: st.DataObject) -> None:
    folder = world.plan.adapter.path(world.volumes)
    if not folder.exists():
        build_adapter.adapter(world.volumes, world.pipeline)
        shutil.copytree(folder, world.folder / "good")
    shutil.rmtree(folder)
    shutil.copytree(world.folder / "good", folder)
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


@pytest.mark.parametrize("key", ["base_model", "tokenizer"])
def test_an_adapter_of_another_base_or_tokenizer_is_refused(world: World, key: str) -> None:
    build_adapter.adapter(world.volumes, world.pipeline)
    world.served = Served(**{**vars(world.served), key: "0" * 16})
    with pytest.raises(Refused, match=f"was trained on {key} .* this server serves 0000") as caught:
        world.take()
    assert caught.value.reason == "base"


def wanted(world: World) -> Wanted:
    return adapters.asked(world.pipeline, world.volumes)


def test_only_an_adapter_whose_own_evaluation_passed_goes_through_the_gate(world: World) -> None:
    build_adapter.evaluation(world.volumes, world.pipeline)
    adapters.check_gate(wanted(world), "seville-hotels", world.volumes)
    for other in ("0" * 16, "../../elsewhere"):
        with pytest.raises(Refused, match=r"is about seville-hotels@"):
            adapters.check_gate(Wanted(other, world.plan.evaluation.digest), "seville-hotels", world.volumes)
    with pytest.raises(Refused, match=r"not another-name@"):
        adapters.check_gate(wanted(world), "another-name", world.volumes)


def test_a_failed_gate_is_refused(world: World) -> None:
    build_adapter.evaluation(world.volumes, world.pipeline, passed=False)
    with pytest.raises(Refused, match="rejected seville-hotels@") as caught:
        adapters.check_gate(wanted(world), "seville-hotels", world.volumes)
    assert caught.value.reason == "gate"


def test_a_verdict_that_somebody_edited_is_refused(world: World) -> None:
    folder = build_adapter.evaluation(world.volumes, world.pipeline, passed=False)
    file = folder / "evaluation.json"
    file.write_text(file.read_text().replace("false", "true"))
    with pytest.raises(Refused, match=r"evaluation\.json was changed") as caught:
        adapters.check_gate(wanted(world), "seville-hotels", world.volumes)
    assert caught.value.reason == "damaged"


def test_the_promotion_names_the_last_promoted_adapter_even_when_the_file_asks_for_another(world: World) -> None:
    with pytest.raises(NotYet, match="no adapter was promoted as seville-hotels yet"):
        adapters.promoted(world.pipeline, world.volumes)
    build_adapter.promote(world.volumes, world.pipeline)
    changed, changed_plan = world.change(training__seed=1)
    assert adapters.promoted(changed, world.volumes) == wanted(world)
    assert adapters.asked(changed, world.volumes).adapter == changed_plan.adapter.digest != world.plan.adapter.digest


@pytest.mark.parametrize("digest", ["../../base-model/base-model/x", "", "0" * 15, "0" * 16 + "\n", "ABCDEFABCDEFABCD"])
def test_a_promotion_cannot_name_a_path(world: World, digest: str) -> None:
    with pytest.raises(Refused, match="is not a digest"):
        adapters.adapter_folder(digest, world.volumes)
    volume = world.volumes / FINE_TUNED_VOLUME
    promotion.promote(volume, "seville-hotels", digest, digest)
    with pytest.raises(Refused, match="is not a digest"):
        adapters.check_gate(adapters.promoted(world.pipeline, world.volumes), "seville-hotels", world.volumes)


def test_a_damaged_promotion_is_refused_and_not_a_crash(world: World) -> None:
    (world.volumes / FINE_TUNED_VOLUME / "promoted").mkdir(parents=True)
    (world.volumes / FINE_TUNED_VOLUME / "promoted" / "seville-hotels").write_text("{")
    with pytest.raises(Refused, match="damaged"):
        adapters.promoted(world.pipeline, world.volumes)


def test_a_folders_signature_changes_when_any_file_does_and_says_when_it_is_absent(world: World) -> None:
    with pytest.raises(NotYet, match=r"adapter [0-9a-f]{16} is not there yet"):
        adapters.signature(world.plan.adapter.path(world.volumes))
    folder = build_adapter.adapter(world.volumes, world.pipeline)
    before = adapters.signature(folder)
    assert adapters.signature(folder) == before
    file = folder / "adapter_config.json"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    assert adapters.signature(folder) != before


def test_what_is_served_survives_the_environment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in world.served.to_environment().items():
        monkeypatch.setenv(key, value)
    assert Served.from_environment() == world.served
