"""Promises of `plan` about serving: it says that a running server restarts exactly when the server itself does so."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.core.environment import Environment
from jobs.core.plan import plan_environment
from jobs.tools import changes
from jobs.tools.changes import Side
from serving import base
from serving.files import Declared
from serving.served import Served
from tests import build_pipeline

DEPLOYMENT = {"kind": "Deployment", "metadata": {"name": "model-inference"}, "spec": {"template": {}}}


def server_of(environment: Environment) -> Served:
    """A server that runs as an environment file describes."""
    planned, serving = plan_environment(environment), environment.serving
    return Served("", "", environment.base_model.name, planned.base_model.digest, planned.tokenizer.digest, "",
                  serving.max_lora_rank, "", mode=serving.mode, slots=serving.slots)


@pytest.mark.parametrize("edit", [
    {}, {"serving__max_lora_rank": 128}, {"serving__max_lora_rank": 32}, {"serving__slots": 4},
    {"serving__mode": "merged"}, {"serving__mode": "merged", "serving__slots": 4},
    {"serving__when_base_changes": "at-once"}, {"retention__keep": 9}, {"base_model__revision": "0" * 40},
    {"base_model__architecture": "LlamaForCausalLM"}, {"tokenizer": {"source": "builtin:tiny"}},
    {"reference_model__source": "builtin:tiny"}])
def test_plan_and_the_server_agree_on_what_restarts_it(edit: dict[str, Any]) -> None:
    before, after = (build_pipeline.build(**keys).environment for keys in ({}, edit))
    planned = changes.compare(Side(before, {}, [DEPLOYMENT]), Side(after, {}, [DEPLOYMENT])).restarts
    restarted = base.changed(Declared(after), server_of(before))
    assert bool(planned) == (restarted is not None), (planned, restarted)
