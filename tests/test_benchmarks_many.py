"""Promises of the benchmark of many adapters: what it declares is what a server serves, and its tables compare."""

from __future__ import annotations

from pathlib import Path

from benchmarks import many
from jobs.core.pipeline import Pipeline
from jobs.core.plan import plan
from serving import candidates, lora
from serving.files import Files
from serving.served import Served
from serving.verification import check_gate, verify


def test_its_adapters_are_proven_and_each_has_a_file_of_its_own(tmp_path: Path) -> None:
    setting = many.prepare(tmp_path, 3, serving={"slots": 2})
    declared = Files(setting.pipelines).read()
    assert list(declared.adapters) == ["hotels-000", "hotels-001", "hotels-002"]
    assert not declared.problems
    assert declared.environment and declared.environment.serving.slots == 2
    for name, pipeline in declared.adapters.items():
        assert isinstance(pipeline, Pipeline)
        planned, candidate = plan(pipeline), candidates.desired(pipeline, tmp_path)
        assert candidates.promoted(name, setting.volumes) == candidate
        check_gate(candidate, name, setting.volumes)
        base = planned.base_model.path(setting.volumes)
        served = Served(str(setting.pipelines), str(setting.volumes), "base", planned.base_model.digest,
                        planned.tokenizer.digest, str(base), 64, str(tmp_path))
        verify(planned.adapter.path(setting.volumes), served, lambda base=base: lora.linear_modules(base))  # type: ignore[misc]
    assert len({p.name for p in (setting.volumes / "fine-tuned-model" / "adapter").iterdir()
                if not p.name.startswith(".")}) == 3


def test_the_tables_end_with_ratios() -> None:
    scales = [many.Scale(1, 30, 31, 1000, 0.02, 1.0, 0.5), many.Scale(300, 33, 60, 1100, 0.04, 2.0, 0.6)]
    assert many.table_of_scales(scales).splitlines()[-1] == "| 300 : 1 | 1.1 | | 1.10 | 2.0 | 2.0 | 1.2 |"
    found = [many.FirstTokens(16, [10.0], [20.0], [30.0]), many.FirstTokens(8, [11.0], [60.0], [90.0])]
    table = many.table_of_first_tokens(found).splitlines()
    assert table[2] == "| 16 slots | 10 | 10 | 20 | 20 | 30 | 30 |"
    assert table[-1] == "| 8 : 16 | 1.1 | 1.1 | 3.0 | 3.0 | 3.0 | 3.0 |"
