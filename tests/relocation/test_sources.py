"""Promises of the registry of sources: every scheme can be listed, opened and pinned."""

from __future__ import annotations

import pytest

from jobs.core.declarations import Loaded, Source
from jobs.core.errors import UserError
from jobs.core.sources import SCHEMES
from jobs.relocation import sources
from tests.hub_server import Fault, Hub
from tests.relocation.conftest import SHA256
from tests.relocation.test_hf import hub_source


def test_every_scheme_of_the_pipeline_file_has_an_implementation() -> None:
    assert sources.IMPLEMENTATIONS.keys() == SCHEMES.keys()
    for name, module in sources.IMPLEMENTATIONS.items():
        assert all(callable(getattr(module, each)) for each in ("find_pin", "files", "open_range")), name
        assert bool(module.ADVICE) == (SCHEMES[name].pin is not None), name


def test_pins_are_looked_up_where_the_source_is(hub: Hub, here: Loaded) -> None:
    source = hub_source(hub)
    hub.faults.append(Fault("data.bin", drop_after=1000))
    assert sources.find_pin(here, Source(source=f"{hub.url}/files/data.bin")) == SHA256
    assert sources.find_pin(here, Source(source="hf://acme/tiny")) == source.revision
    assert sources.find_pin(here, Source(source="hf://acme/tiny", revision="main")) == source.revision
    with pytest.raises(UserError, match="not found"):
        sources.find_pin(here, Source(source=f"{hub.url}/files/nothing"))
