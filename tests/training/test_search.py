"""Promises of the search: the best trial wins and the others stop early, the same one on every machine; a kill costs
little; the winner is the adapter that a training with its settings gives."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from jobs.core import models, pipeline
from jobs.core.errors import Terminated, UserError
from jobs.core.pipeline import Lora, Training
from jobs.core.plan import plan
from jobs.core.search import Search
from jobs.data import encode, encoded, split
from jobs.data.encoded import Splits
from jobs.data.encoding import Encoded
from jobs.data.formats import files_in
from jobs.tools.pods import CHECKOUT
from jobs.training import callbacks, search, train
from jobs.training.distributed import Team
from tests import build_models
from tests.training.test_distributed import trained
from tests.training.test_train import folders, fresh_volumes, records, settings, start, tiny, weights

RANKS = {"lora.r": [4, 8, 16]}


def training(**declared: Any) -> Training:
    return Training.model_validate({"epochs": 3, "max_length": 8, "tokens_per_batch": 8,
                                    "search": {"candidates": RANKS} | declared})


def splits(batches: int = 20) -> Splits:
    """Data that fill as many batches of 8 tokens."""
    data = [Encoded.of([1] * 4, [2] * 4)] * batches
    return Splits(data, data, 0, data)


class Script:
    """A training whose losses are known: trial N has `losses[N - 1]` at the rungs, one after another."""

    def __init__(self, *losses: list[float], stop_at: int | None = None) -> None:
        self.losses, self.stop_at = losses, stop_at
        self.calls: list[tuple[int, int | None]] = []
        self.reached: dict[int, list[int]] = {}

    def __call__(self, trial: int, settings: Training, until: int | None) -> search.History:
        if len(self.calls) == self.stop_at:
            raise Terminated("stopped")
        self.calls.append((trial, until))
        steps = self.reached.setdefault(trial, [])
        if until is None:
            return [{"step": 60, "epoch": 3.0, "loss": 0.5}]
        steps.append(until)
        losses = self.losses[trial - 1][:len(steps)]
        if losses[-1] == -1:
            raise callbacks.NotFinite(f"trial {trial}: the loss is not finite")
        return [{"step": step, "epoch": step / 20, "validation_loss": loss}
                for step, loss in zip(steps, losses, strict=True)]


def run(script: Script, place: Path, **declared: Any) -> tuple[Training, dict[str, Any]]:
    settings, history, record = search.run(training(**declared), splits(), script, place, place / "runs", Team())
    assert history == [{"step": 60, "epoch": 3.0, "loss": 0.5}], "that of the whole training"
    return settings, record


def test_the_best_trial_at_the_first_rung_goes_on_alone_and_its_adapter_is_saved(tmp_path: Path) -> None:
    script = Script([3.0], [1.0, 0.5], [2.0])
    chosen, record = run(script, tmp_path)
    assert script.calls == [(1, 20), (2, 20), (3, 20), (2, 60), (2, None)]
    assert (chosen.lora.r, chosen.search) == (8, None)
    assert (record["chosen"], record["settings"], record["trainings"]) == (2, {"lora.r": 8}, 1.67)
    assert [trial["ended"] for trial in record["trials"]] == ["stopped: place 3 of 3", "chosen",
                                                             "stopped: place 2 of 3"]
    assert record["trials"][1] == {
        "trial": 2, "settings": {"lora.r": 8}, "steps": 60, "ended": "chosen",
        "rungs": [{"step": 20, "validation_loss": 1.0}, {"step": 60, "validation_loss": 0.5}],
        "curve": [[20, 1.0], [60, 0.5]]}


def test_each_rung_keeps_its_share(tmp_path: Path) -> None:
    script = Script(*([9.0 - n, 4.0 + n, n] for n in range(9)))
    _, record = run(script, tmp_path, candidates={"lora.alpha": list(range(1, 10))}, halving={"rungs": 3})
    assert [until for _, until in script.calls].count(math.ceil(60 / 9)) == 9
    assert [trial for trial, until in script.calls if until == 20] == [7, 8, 9]
    assert [trial for trial, until in script.calls if until == 60] == [7], "the best of the second rung"
    assert record["chosen"] == 7


def test_without_halving_all_trials_are_trained_to_the_end(tmp_path: Path) -> None:
    script = Script([0.4], [0.3], [0.5])
    _, record = run(script, tmp_path, halving={"rungs": 1})
    assert script.calls == [(1, 60), (2, 60), (3, 60), (2, None)]
    assert [trial["ended"] for trial in record["trials"]] == ["trained to the end: place 2 of 3", "chosen",
                                                             "trained to the end: place 3 of 3"]


@pytest.mark.parametrize(("losses", "chosen"), [
    ([1.00049, 1.00001, 1.0], 1),  # as good as each other: the first
    ([1.0012, 1.00001, 1.0], 2),
    ([-1, 3.0, -1], 2),  # -1: not finite
])
def test_float_noise_does_not_choose_and_what_diverges_loses(tmp_path: Path, losses: list[float], chosen: int) -> None:
    _, record = run(Script(*([loss, 0.5] for loss in losses)), tmp_path)
    assert record["chosen"] == chosen
    if any(loss == -1 for loss in losses):
        assert record["trials"][0]["ended"] == "its loss was not finite"
    json.dumps(record, allow_nan=False)


def test_with_keep_best_a_trial_counts_with_its_lowest_loss_and_may_end_early(tmp_path: Path) -> None:
    """Trial 1 was better before; patience ended trial 2 at step 12, and it stays in the race."""
    def train(trial: int, settings: Training, until: int | None) -> search.History:
        curve = {1: {12: 0.6, 15: 0.5, 30: 3.0, 60: 2.0}, 2: {6: 1.0, 12: 1.1}, 3: {15: 2.0}}[trial]
        return [{"step": step, "epoch": 1.0, "validation_loss": loss} for step, loss in curve.items()
                if until is None or step <= until]

    best = training(halving={"factor": 2}).model_copy(update={"keep": "best"})
    _, _, record = search.run(best, splits(), train, tmp_path, tmp_path / "runs", Team())
    assert record["chosen"] == 1
    reached = [[(rung["step"], rung["validation_loss"]) for rung in trial["rungs"]] for trial in record["trials"]]
    # No weights are kept at step 15, which only the search looks at: they are at every tenth of 60 steps.
    assert reached == [[(15, 0.5), (30, 0.6), (60, 0.6)], [(12, 1.0), (12, 1.0)], [(15, 2.0)]]


def test_a_trial_that_diverged_does_not_go_on_even_if_there_is_room(tmp_path: Path) -> None:
    script = Script([-1], [2.0, 0.5, 0.4], [-1])
    run(script, tmp_path, halving={"factor": 2})
    assert script.calls == [(1, 15), (2, 15), (3, 15), (2, 30), (2, 60), (2, None)]


def test_if_all_trials_diverge_that_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at rung 1, the loss of no trial is a finite number. Lower the learning"):
        run(Script([-1], [-1], [-1]), tmp_path)


def test_trials_of_different_lengths_are_compared_at_the_same_share_of_their_steps(tmp_path: Path) -> None:
    script = Script([2.0], [1.0, 0.5])
    search.run(training(candidates={"epochs": [3, 6]}), splits(10), script, tmp_path, tmp_path / "runs", Team())
    assert script.calls == [(1, 10), (2, 20), (2, 60), (2, None)]


@pytest.mark.parametrize("stop_at", range(6))
def test_an_interrupted_search_continues_with_what_is_not_done(tmp_path: Path, stop_at: int) -> None:
    losses = ([3.0, 0.1], [1.0, 0.5], [2.0, 0.2])
    _, expected = run(Script(*losses), tmp_path / "quiet")
    first, second = Script(*losses, stop_at=stop_at), Script(*losses)
    if stop_at < 5:
        with pytest.raises(Terminated):
            run(first, tmp_path / "stopped")
    second.reached = first.reached
    assert run(second, tmp_path / "stopped")[1] == expected
    assert [*first.calls, *second.calls] == [(1, 20), (2, 20), (3, 20), (2, 60), (2, None)]


def test_a_state_that_cannot_be_read_starts_the_search_again(tmp_path: Path) -> None:
    (tmp_path / "trial-1").mkdir()
    (tmp_path / search.STATE).write_text('[{"trial": 1, "ru')
    script = Script([3.0], [1.0, 0.5], [2.0])
    assert run(script, tmp_path)[1]["chosen"] == 2
    assert len(script.calls) == 5 and not (tmp_path / "trial-1").exists()


def test_checkpoints_of_stopped_trials_are_removed_at_once(tmp_path: Path) -> None:
    for trial in (1, 2, 3):
        search.trial_folder(tmp_path, trial).mkdir(parents=True)
    seen = []

    class Looking(Script):
        def __call__(self, trial: int, settings: Training, until: int | None) -> search.History:
            seen.append(sorted(path.name for path in tmp_path.glob("trial-*")))
            return super().__call__(trial, settings, until)

    run(Looking([3.0], [1.0, 0.5], [2.0]), tmp_path)
    assert seen[2] == ["trial-1", "trial-2", "trial-3"] and seen[3:] == [["trial-2"]] * 2


def test_the_log_names_trial_and_rung_and_ends_with_a_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def train(trial: int, settings: Training, until: int | None) -> search.History:
        logging.getLogger("jobs").info("training steps: %d of 60 (100 %%)", 40)
        return script(trial, settings, until)

    script = Script([3.0], [1.0, 0.5], [-1])
    with caplog.at_level(logging.INFO, "jobs"):
        search.run(training(), splits(), train, tmp_path, tmp_path / "runs", Team())
    lines = caplog.messages
    assert lines[0] == "search: 3 trials over lora.r: 3 to 1/3 of their steps, 1 to the end; 1.67 trainings"
    assert "trial 2 of 3 (lora.r 8): rung 1 of 2: to step 20 of 60" in lines
    assert "trial 2 of 3 (lora.r 8): training steps: 40 of 60 (100 %)" in lines
    assert "trial 2 of 3 (lora.r 8): step 20 of 60: validation loss 1.000" in lines
    assert "rung 1 of 2: of 3 trials, best: 2" in lines
    assert [re.split(" {2,}", line) for line in lines[-1].strip().splitlines()][2:] == [
        ["2", "lora.r 8", "60 of 60", "0.500", "chosen"],
        ["3", "lora.r 16", "20 of 60", "not finite", "its loss was not finite"]]


# --- what it is made of ---------------------------------------------------------------------------------------------


class Follower(Team):
    """One of two processes; it hears from the main one what that decided."""

    def __init__(self, *heard: Any) -> None:
        super().__init__()
        self.rank, self.size = 1, 2
        self.heard, self.sent = list(heard), list[Any]()

    def broadcast(self, value: Any = None) -> Any:
        self.sent.append(value)
        return self.heard.pop(0)


def test_only_the_main_process_writes_and_the_others_decide_by_its_results(tmp_path: Path) -> None:
    """Their losses may differ in the last digits, and they must go on with the same trials."""
    main = search.State(tmp_path, Team())
    for trial, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        main.add(search.Result(trial, 1, 20, loss, [[20, loss]]))
    before = (tmp_path / search.STATE).read_bytes()
    rows = json.loads(before)
    for trial in (1, 2, 3):
        search.trial_folder(tmp_path, trial).mkdir()
    follower = Follower(rows[:1], *rows[1:], {"trial": 2, "rung": 2, "step": 60, "loss": 0.5, "curve": [[60, 0.5]]})
    script = Script([0.1], [9.0, 9.0], [0.2])  # by its own numbers, trial 1 is the best
    settings, _, record = search.run(training(), splits(), script, tmp_path, tmp_path / "runs", follower)
    assert script.calls == [(2, 20), (3, 20), (2, 60), (2, None)] and settings.lora.r == 8
    assert record["trials"][1]["rungs"] == [{"step": 20, "validation_loss": 1.0}, {"step": 60, "validation_loss": 0.5}]
    assert follower.sent[0] == [] and follower.sent[1]["loss"] == 9.0
    assert (tmp_path / search.STATE).read_bytes() == before and not (tmp_path / "runs").exists()
    assert all(search.trial_folder(tmp_path, trial).exists() for trial in (1, 2, 3))


def test_the_record_says_what_was_searched_and_how(tmp_path: Path) -> None:
    _, record = run(Script([3.0], [1.0, 0.5], [2.0]), tmp_path)
    trials = record.pop("trials")
    assert record == {"candidates": {"lora.r": [4, 8, 16]}, "method": "grid", "halving": record["halving"],
                      "rungs": [{"trials": 3, "share": "1/3"}, {"trials": 1, "share": "1"}], "trainings": 1.67,
                      "digits_compared": 3, "chosen": 2, "settings": {"lora.r": 8}}
    assert trials[0] == {"trial": 1, "settings": {"lora.r": 4}, "steps": 60, "ended": "stopped: place 3 of 3",
                         "rungs": [{"step": 20, "validation_loss": 3.0}], "curve": [[20, 3.0]]}


def test_a_weight_of_eight_bits_that_was_changed_is_noticed_too() -> None:
    import torch

    model: Any = torch.nn.Linear(4, 4, bias=False)
    model.weight = torch.nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    before = search.fingerprints(model)
    assert before.keys() == {"weight"} and search.fingerprints(model) == before
    model.weight.data.view(torch.uint8)[0, 0] += 1
    assert search.fingerprints(model) != before


def test_a_prefix_is_put_before_lines_with_and_without_arguments_and_only_while_it_is_asked_for(
        caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("jobs")
    caplog.set_level(logging.INFO, "jobs")
    with suppress(UserError), search._prefixed("50 % of 2"):
        log.info("step %d", 7)
        log.info("100 %")
        raise UserError("stopped")
    log.info("after")
    assert caplog.messages == ["50 % of 2: step 7", "50 % of 2: 100 %", "after"]


def test_tensorboard_lists_the_trials_with_their_settings_and_makes_no_runs_for_it(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    run(Script([3.0], [1.0, 0.5], [2.0]), tmp_path,
        candidates={"lora.r": [4], "lora.target_modules": [["q_proj"], ["q_proj", "v_proj"], "all-linear"]})
    runs = sorted(path.parent.relative_to(tmp_path / "runs") for path in (tmp_path / "runs").rglob("events*"))
    assert runs == [Path("trial-1"), Path("trial-2"), Path("trial-3")]
    events = EventAccumulator(str(tmp_path / "runs" / "trial-2"))
    events.Reload()
    tags = events.summary_metadata
    start = plugin_data_pb2.HParamsPluginData.FromString(tags[metadata.SESSION_START_INFO_TAG].plugin_data.content)
    found = start.session_start_info.hparams
    assert found["lora.r"].number_value == 4 and found["lora.target_modules"].string_value == "q_proj+v_proj"
    shown = plugin_data_pb2.HParamsPluginData.FromString(tags[metadata.EXPERIMENT_TAG].plugin_data.content)
    assert {info.name.tag for info in shown.experiment.metric_infos} == {"loss/validation", "loss/train"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_trials_share_one_base_model_and_leave_it_as_it_was(kind: str) -> None:
    """After each adapter the model has the same layers with the same weights; one that was changed is noticed."""
    import torch

    loads = []

    def load() -> Any:
        loads.append(1)
        return tiny(kind)[0]

    shared, (fresh, layers) = search.SharedModel(load, once=True), tiny(kind)
    for rank in (4, 8):
        with shared.lent() as model:
            adapted = train.add_adapter(model, Training.model_validate({"lora": {"r": rank}}), layers)
            assert any("lora" in name for name, _ in model.named_parameters())
            for weight in adapted.parameters():
                if weight.requires_grad:
                    weight.data.fill_(1.0)
    with shared.lent() as model:
        assert [*model.state_dict()] == [*fresh.state_dict()] and len(loads) == 1
        assert all(torch.equal(weight, fresh.state_dict()[name]) for name, weight in model.state_dict().items())
        assert not hasattr(model, "peft_config")
    with pytest.raises(RuntimeError, match="a trial changed the base model"), shared.lent() as model:
        next(iter(model.parameters())).data[0, 0] += 1e-3


def test_a_model_that_training_divides_among_processes_is_loaded_for_each_trial() -> None:
    loads = []
    shared = search.SharedModel(lambda: loads.append(1) or tiny("llama")[0], once=False)  # type: ignore[func-returns-value]
    for _ in range(2):
        with shared.lent():
            pass
    assert len(loads) == 2


def test_the_chosen_adapter_is_that_of_a_training_with_its_settings(tmp_path: Path) -> None:
    """To the byte, although other trials were trained on the same model before and in between."""
    data = records(30)
    parts = Splits(data, data[:5], 0, data[10:20])
    base = settings(lora=Lora(r=8, alpha=8, dropout=0.1))
    declared = Search.model_validate({"candidates": {"lora.r": [2, 8], "learning_rate": [1e-4, 1e-2]}})
    searching = base.model_copy(update={"search": declared})
    shared = search.SharedModel(lambda: tiny("llama")[0], once=True)

    def trial(number: int, of: Training, until: int | None) -> search.History:
        own = callbacks.Folders(*(search.trial_folder(tmp_path / name, number) for name in ("checkpoints", "runs")))
        with shared.lent() as model:
            return train.train(model, parts, of, ["q_proj", "v_proj"], own, tmp_path / "chosen", until=until)

    chosen, history, record = search.run(searching, parts, trial, tmp_path / "checkpoints", tmp_path / "runs", Team())
    plain = train.train(tiny("llama")[0], parts, chosen, ["q_proj", "v_proj"], folders(tmp_path / "plain"),
                        tmp_path / "plain" / "out")
    assert record["chosen"] in (2, 4) and [trial["ended"] for trial in record["trials"]].count("chosen") == 1
    assert ((tmp_path / "chosen" / "adapter_model.safetensors").read_bytes()
            == (tmp_path / "plain" / "out" / "adapter_model.safetensors").read_bytes())
    assert [entry for entry in history if "loss" in entry] == [entry for entry in plain if "loss" in entry]


# --- the job as a process -------------------------------------------------------------------------------------------

SEARCH = {"candidates": {"lora.r": [4, 8, 16]}}


def searching_inputs(place: Path, *, validation: Any = build_models.RECORDS[1:3]) -> tuple[Path, Path]:
    """A pipeline file whose inputs to training are published, with a search over three ranks, and the volumes' root."""
    loaded, volumes = build_models.published_pipeline(
        place, without=["adapter", "reference_model"], validation=validation, search=SEARCH, checkpoint_steps=3,
        epochs=60, learning_rate=1e-2)
    return loaded.path, volumes


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A search that ran in one go: pipeline file, volumes and log."""
    file, volumes = searching_inputs(tmp_path_factory.mktemp("uninterrupted"))
    process = start(file, volumes)
    _, output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return file, volumes, output


def test_the_adapter_holds_the_chosen_settings_and_the_record_of_the_search(
        uninterrupted: tuple[Path, Path, str]) -> None:
    file, volumes, output = uninterrupted
    wanted = plan(pipeline.load(file).pipeline)
    folder = wanted.adapter.path(volumes)
    record = json.loads((folder / "search.json").read_text())
    chosen = record["settings"]["lora.r"]
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == chosen
    assert record["trials"][record["chosen"] - 1]["ended"] == "chosen"
    assert [trial["rungs"][0]["step"] for trial in record["trials"]] == [20, 20, 20]
    assert record["trials"][record["chosen"] - 1]["rungs"][1]["step"] == 60
    first = [round(trial["rungs"][0]["validation_loss"], 3) for trial in record["trials"]]
    assert first.index(min(first)) + 1 == record["chosen"]
    card = (folder / "README.md").read_text()
    assert f"| LoRA | r {chosen}, alpha 32, dropout 0.05 |" in card
    assert f"| chosen by search | lora.r {chosen}, among 3 trials by the loss on the validation split |" in card
    assert "search: 3 trials over lora.r: 3 to 1/3 of their steps, 1 to the end; 1.67 trainings" in output
    assert "trial 2 of 3 (lora.r 8): step 20 of 60: validation loss" in output
    runs = sorted(path.name for path in (volumes / "fine-tuned-model" / "tensorboard" / "hotels"
                                         / wanted.adapter.digest).iterdir())
    assert runs == ["trial-1", "trial-2", "trial-3"]
    assert not list(volumes.glob("fine-tuned-model/checkpoints/*")), "checkpoints are removed once the adapter is there"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "trial", "code"), [
    (signal.SIGKILL, "trial-1", -9), (signal.SIGKILL, "trial-3", -9), (signal.SIGTERM, "trial-2", 143)])
def test_a_stopped_search_resumes_and_ends_with_the_same_bytes(
        tmp_path: Path, uninterrupted: tuple[Path, Path, str], number: signal.Signals, trial: str, code: int) -> None:
    """A kill costs one trial's steps since its last checkpoint: what others reached is not done again."""
    file, inputs, _ = uninterrupted
    volumes = fresh_volumes(tmp_path, inputs)
    first = start(file, volumes)
    deadline = time.monotonic() + 300
    while not list(volumes.glob(f"fine-tuned-model/checkpoints/*/{trial}/*/{callbacks.CHECKPOINT_MARKER}")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(number)
    _, output = first.communicate(timeout=60)
    assert first.returncode == code, output
    second = start(file, volumes)
    _, output = second.communicate(timeout=300)
    assert second.returncode == 0, output
    *done, resumed = (f"trial {n} of 3 (lora.r {2 ** (1 + n)}): " for n in range(1, 1 + int(trial[-1])))
    assert f"{resumed}resuming from the checkpoint at step" in output
    assert not [prefix for prefix in done if f"{prefix}rung 1 of 2" in output]
    assert weights(file, volumes) == weights(file, inputs)


@pytest.mark.slow
def test_two_processes_choose_the_trial_that_one_chooses(
        tmp_path: Path, uninterrupted: tuple[Path, Path, str]) -> None:
    file, inputs, _ = uninterrupted
    volumes = fresh_volumes(tmp_path, inputs)
    _, history, output = trained(file, volumes, PROCESSES_PER_NODE="2")
    found, expected = (json.loads((plan(pipeline.load(file).pipeline).adapter.path(place) / "search.json").read_text())
                       for place in (volumes, inputs))
    assert found["chosen"] == expected["chosen"]
    for one, other in zip(found["trials"], expected["trials"], strict=True):
        assert one["ended"] == other["ended"]
        assert one["rungs"][0]["validation_loss"] == pytest.approx(other["rungs"][0]["validation_loss"], abs=1e-4)
    assert output.count("trial 2 of 3 (lora.r 8): rung 1 of 2: to step 20 of 60") == 1, "said once"
    assert max(entry["step"] for entry in history) == 60


def test_without_a_validation_split_training_says_so_before_it_loads_the_model(tmp_path: Path) -> None:
    file, volumes = searching_inputs(tmp_path, validation=())
    process = start(file, volumes)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "training.search chooses by the loss on the validation split, which is empty" in output
    assert "Traceback" not in output


# --- overlays/kind --------------------------------------------------------------------------------------------------


def searching_kind(place: Path) -> pipeline.LoadedPipeline:
    """The committed adapter with its commented search switched on."""
    folder = place / "overlays/kind/adapters/seville-hotels"
    shutil.copytree(CHECKOUT / "overlays" / "kind", place / "overlays" / "kind")
    file = folder / "pipeline.yaml"
    text = file.read_text()
    for line in ("validation: 0.1", "search:", "  candidates: {lora.r: [4, 8, 16]}"):
        assert text.count(f"  # {line}\n") == 1
        text = text.replace(f"  # {line}\n", f"  {line}\n")
    file.write_text(text)
    return pipeline.load(folder)


EPOCHS = 2  # instead of 20: starting each part then weighs more


@pytest.mark.slow
def test_the_search_of_overlays_kind_costs_the_steps_that_the_docs_state(tmp_path: Path, embedded_models: Path) -> None:
    """Three ranks on the embedded model. It prints the processor time, too: docs/search.md states it for 6 epochs."""
    loaded = searching_kind(tmp_path)
    data = loaded.pipeline.dataset
    split.split(files_in(loaded.resolve(data)), data.holdout, tmp_path, data.validation)
    wanted, encoded_data = plan(loaded.pipeline), tmp_path / "encoded"
    encoded_data.mkdir()
    encode.encode_splits(tmp_path, encoded_data, encode.Settings(wanted.tokenizer.path(embedded_models),
                                                                loaded.pipeline.training.max_length))
    splits, searched = encoded.read(encoded_data), loaded.pipeline.training.model_copy(update={"epochs": EPOCHS})
    base = wanted.base_model.path(embedded_models)
    layers = models.check_target_modules(models.architecture(base), "all-linear", str(base), "lora")
    shared = search.SharedModel(lambda: models.load_model(base), once=True)

    def trial(number: int, of: Training, until: int | None) -> search.History:
        own = callbacks.Folders(*(search.trial_folder(tmp_path / name, number) for name in ("checkpoints", "runs")))
        with shared.lent() as model:
            return train.train(model, splits, of, layers, own, tmp_path / "chosen", until=until)

    def measured(work: Callable[[], Any]) -> tuple[float, Any]:
        started = time.process_time()
        done = work()
        return time.process_time() - started, done

    trial(8, searched, 1)  # loading the model and the libraries is not part of either
    plain, _ = measured(lambda: trial(9, searched.with_settings({"lora.r": 8}), None))
    searching, (chosen, _, record) = measured(lambda: search.run(searched, splits, trial, tmp_path / "checkpoints",
                                                                 tmp_path / "runs", Team()))
    last = [found["rungs"][-1]["step"] for found in record["trials"]]
    print(f"\nsteps {sum(last)} of {max(last)}: {sum(last) / max(last):.2f}; {searching:.1f} s of {plain:.1f} s: "
          f"{searching / plain:.2f}")
    assert sum(last) / max(last) == pytest.approx(5 / 3, abs=2 / max(last)), "each step is computed once"
    assert chosen.lora.r in (4, 8, 16) and len(splits.validation) > 30
