"""What `make mutants` lists is there. The run itself is slow and no part of `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import mutants


@pytest.mark.parametrize("module", mutants.read_modules().values(), ids=lambda module: module.path)
def test_the_module_its_tests_and_its_survivors_are_there(module: mutants.Module) -> None:
    assert (mutants.ROOT / module.path).is_file()
    files = [Path(name.removeprefix("--deselect=").partition("::")[0]) for name in module.tests]
    assert all((mutants.ROOT / file).is_file() for file in files)
    assert all(module.survivors.values()), "each says why"
