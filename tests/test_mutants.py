"""What `make mutants` lists is there. The run itself is slow and no part of `make test`."""

from __future__ import annotations

import pytest

from tests import mutants


@pytest.mark.parametrize("module", mutants.read_modules().values(), ids=lambda module: module.path)
def test_the_module_its_tests_and_its_survivors_are_there(module: mutants.Module) -> None:
    assert (mutants.ROOT / module.path).is_file()
    for each in module.tests:
        file, _, name = each.removeprefix("--deselect=").partition("::")
        assert f"def {name.partition('[')[0]}" in (mutants.ROOT / file).read_text(encoding="utf-8")
    assert all(module.survivors.values()), "each says why"
