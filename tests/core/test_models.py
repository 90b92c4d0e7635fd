"""Promises about base models: what vLLM cannot serve is refused. tests/test_serving_vllm.py compares with real vLLM."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.core import models
from jobs.core.errors import RetryableError, UserError
from tests.build_models import tiny_llama, tiny_tokenizer


def test_an_architecture_that_cannot_be_served_is_refused_with_those_that_can() -> None:
    with pytest.raises(UserError, match="here: vLLM cannot serve a LoRA adapter on GPTJForCausalLM. Choose .*Llama"):
        models.check_servable("GPTJForCausalLM", "here")


def test_a_refusal_names_mode_merged_where_that_would_help() -> None:
    with pytest.raises(UserError, match=r"LoRA adapter on GPT2LMHeadModel. Set `serving: {mode: merged}`.*LlamaForC"):
        models.check_servable("GPT2LMHeadModel", "here")
    assert models.check_servable("GPT2LMHeadModel", "here", "merged") == {"c_attn", "c_proj", "c_fc"}
    assert models.check_servable("LlamaForCausalLM", "here", "merged") == models.SERVABLE["LlamaForCausalLM"]


def test_all_linear_means_every_layer_that_can_be_served() -> None:
    assert models.check_target_modules("Phi3ForCausalLM", "all-linear", "here") == [
        "down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


@pytest.mark.parametrize(("content", "message"), [
    (None, "has no config.json"),
    ("{", "cannot be read"),
    ("[" * 100_000, "cannot be read"),
    ("[]", "must hold a JSON mapping"),
    ("{}", "`architectures` must name one class"),
    ('{"architectures": ["A", "B"]}', "`architectures` must name one class"),
])
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        models.architecture(tmp_path)


def test_where_a_gpu_is_required_nothing_is_computed_on_the_cpu(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong image or an old driver: training would take weeks, and only `top` would say why."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    models.check_gpu()
    monkeypatch.setenv("REQUIRE_GPU", "1")
    for compute in (models.check_gpu, lambda: models.load_model(tmp_path)):
        with pytest.raises(UserError, match="REQUIRE_GPU is set, but torch .* sees no GPU"):
            compute()


def test_too_little_gpu_memory_says_what_to_change() -> None:
    import torch

    with pytest.raises(UserError, match="Tried to allocate 2.00 GiB. Lower it$"), models.gpu_memory("Lower it"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")
    with pytest.raises(RuntimeError, match="our own"), models.gpu_memory("Lower it"):
        raise RuntimeError("our own")


UNREADABLE = "/proc/self/mem"  # a file that opens, and whose reading fails: EIO for read(2), ENODEV for mmap(2)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_volume_that_fails_while_a_model_is_read_is_worth_a_retry(tmp_path: Path, file: str) -> None:
    tiny_llama(tmp_path)
    (tmp_path / file).unlink()
    (tmp_path / file).symlink_to(UNREADABLE)
    with pytest.raises(RetryableError, match=r": its volume fails or is gone; look at node and storage$"):
        models.load_model(tmp_path)
    if file == "config.json":
        with pytest.raises(RetryableError, match=r"config.json: cannot be read: Input/output error: its volume"):
            models.architecture(tmp_path)


def test_a_volume_that_fails_while_a_tokenizer_is_read_is_worth_a_retry(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer(tmp_path)
    raised_while_loading(monkeypatch, "AutoTokenizer", OSError(errno.ESTALE, "Stale file handle"))
    with pytest.raises(RetryableError, match="the tokenizer cannot be loaded: Stale file handle: its volume"):
        models.load_tokenizer(tmp_path)


def raised_while_loading(monkeypatch: pytest.MonkeyPatch, kind: str, error: BaseException) -> None:
    import transformers

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", fail)


def chained(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


def safetensors_error(text: str) -> Exception:
    from safetensors import SafetensorError

    error: Exception = SafetensorError(text)
    return error


@pytest.mark.parametrize(("error", "kind", "message"), [
    (lambda: safetensors_error("I/O error: Stale file handle (os error 116)"), RetryableError, "its volume fails"),
    (lambda: chained(OSError("Can't load the model"), OSError(errno.EIO, "Input/output error")), RetryableError,
     "Input/output error: its volume fails"),
    (lambda: RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be…"),
     RetryableError, "uncorrectable ECC error encountered: the GPU fails or is taken"),
    (lambda: RuntimeError("CUDA error: no kernel image is available for execution on the device"), UserError,
     "torch does not fit this GPU"),
    (lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried "
                          "to allocate 9 bytes. Error code 12 (Cannot allocate memory)"), UserError,
     "Raise its memory limit"),
    (lambda: MemoryError(), UserError, "Raise its memory limit"),
    (lambda: OSError(errno.EACCES, "Permission denied"), UserError, "Permission denied"),
    (lambda: OSError("Error no file named model.safetensors found"), UserError, "no file named model.safetensors"),
    (lambda: safetensors_error("Error while deserializing header: header too large"), UserError, "header too large"),
    (lambda: ValueError("Unrecognized model"), UserError, "Unrecognized model"),
    (lambda: RuntimeError("size mismatch for lm_head.weight"), UserError, "size mismatch"),
    (lambda: ValueError("Validation error of 'vocab_size':\n    expected int"), UserError, "size': expected int$"),
])
def test_only_what_somebody_must_change_ends_without_a_retry(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception],
        kind: type[Exception], message: str) -> None:
    raised_while_loading(monkeypatch, "AutoModelForCausalLM", error())
    with pytest.raises(kind, match=message) as raised:
        models.load_model(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: the model cannot be loaded: ")
    assert "\n" not in str(raised.value)


def test_too_little_gpu_memory_while_loading_keeps_its_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    raised_while_loading(monkeypatch, "AutoModelForCausalLM", torch.OutOfMemoryError("CUDA out of memory. Tried. Rest"))
    with (pytest.raises(UserError, match="the GPU has too little memory: CUDA out of memory. Tried. Lower it"),
          models.gpu_memory("Lower it")):
        models.load_model(tmp_path)
