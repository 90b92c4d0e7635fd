"""Large libraries are imported without the garbage collections that take a quarter of the time."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from jobs.core.imports import fast_imports


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    yield
    gc.enable()


def test_garbage_is_collected_again_afterwards_whatever_an_import_raises() -> None:
    with fast_imports():
        assert not gc.isenabled()
        with fast_imports():
            pass
        assert not gc.isenabled(), "still inside the outer one"
    assert gc.isenabled()
    with pytest.raises(ImportError), fast_imports():
        raise ImportError
    assert gc.isenabled()


def test_who_turned_collection_off_finds_it_off() -> None:
    gc.disable()
    with fast_imports():
        pass
    assert not gc.isenabled()
