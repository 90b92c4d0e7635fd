"""Mutation testing: changes the code that decides in small ways, and lists the changes that no quick test notices.

    make mutants                                  # every module of tests/mutants.toml
    make mutants ARGS="jobs/core/plan.py"         # some
    make mutants ARGS="jobs/core/plan.py --fresh" # again from the start

mutmut makes and runs the mutants, each module in a copy of the tree below .local/mutants. A run that was interrupted
continues; what was not killed is tried again, with new tests too. An old test that reaches further than before needs
--fresh. Mutants that change only the words of a message are not made.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ROOT / ".venv-mutants"
WORK = ROOT / ".local" / "mutants"
LOG = "mutmut.log"
AIM = 90  # percent
HANGS_SECONDS = 30  # for one test, far below mutmut's limit for all of a mutant's tests; no quick test takes as long
UNUSABLE = 255  # mutmut's exit code for a run that pytest refuses; it takes it for a timeout
COPIED = ("jobs", "serving", "base", "overlays", "argocd", "tests", "pyproject.toml")
# mutmut leaves decorated functions alone. Of these it is known that they take the mutant like the function itself.
TRANSPARENT = ("property", "contextmanager", "model_validator", "functools.lru_cache", "cache")


@dataclass(frozen=True)
class Module:
    """A module to change, and how: see tests/mutants.toml."""

    path: str
    tests: Sequence[str]
    imports: Sequence[str]
    survivors: dict[str, str]  # the changed line, or the function -> why it may survive

    @property
    def folder(self) -> Path:
        return WORK / self.path.removesuffix(".py").replace("/", "-")


def read_modules() -> dict[str, Module]:
    table = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text(encoding="utf-8"))
    heavy = table.pop("heavy")
    return {path: Module(path, entry["tests"], [*(heavy if entry.get("heavy") else []), *entry.get("imports", [])],
                         entry.get("survivors", {}))
            for path, entry in table.items()}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="files of tests/mutants.toml; all by default")
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    known = read_modules()
    unknown = [path for path in options.modules if path not in known]
    if unknown:
        parser.error(f"{', '.join(unknown)}: not in tests/mutants.toml")
    rows = []
    for path in options.modules or known:
        module = known[path]
        _prepare(module, options.fresh)
        with (module.folder / LOG).open("w", encoding="utf-8") as log:
            _call(module, "--worker", str(options.processes), output=log)
        survivors, _, row = _call(module, "--result").rpartition("\n\n")
        print(survivors, flush=True)
        rows.append(row.split())
    print(f"{'module':40} mutants killed timeout survived explained      %")
    for path, *values in rows:
        print(f"{path:40} " + " ".join(f"{value:>{width}}" for value, width in
                                       zip(values, (7, 6, 7, 8, 9, 6), strict=True)))
    return 0 if all(float(values[-1]) >= AIM for _, *values in rows) else 1


def _call(module: Module, *arguments: str, output: Any = subprocess.PIPE) -> str:
    """Run a part of this file in a process of its own, in the module's folder: mutmut changes its process for good."""
    command = [sys.executable, __file__, arguments[0], module.path, *arguments[1:]]
    # CI: Hypothesis takes the same examples each time and has no deadlines, which a busy machine would miss.
    # Without bytecode, each mutant would compile the tests and the code again, which takes longer than the tests.
    environment = os.environ | {"PYTHONPATH": str(PACKAGES), "CI": "true", "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(command, cwd=module.folder, env=environment, text=True, stdout=output,
                          stderr=subprocess.STDOUT if output != subprocess.PIPE else None)
    if done.returncode:
        sys.exit(f"error: {module.path}: {arguments[0]} failed; see {module.folder / LOG}")
    return done.stdout or ""


def _prepare(module: Module, fresh: bool) -> None:
    """A folder in which mutmut finds the tree, its own settings and the results of earlier runs."""
    if fresh:
        shutil.rmtree(module.folder, ignore_errors=True)
    module.folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        link = module.folder / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name)
    lists = {
        "source_paths": ["jobs", "serving"], "only_mutate": [module.path],
        "also_copy": [name for name in COPIED if name not in ("jobs", "serving")],
        "pytest_add_cli_args_test_selection": ["-m", "not slow", *module.tests],
        "pytest_add_cli_args": [
            "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", f"--timeout={HANGS_SECONDS}",
            "-p", "no:unraisableexception"]}  # which collects garbage ten times: a second for each mutant
    lines = [f"{key} =" + "".join(f"\n    {value}" for value in values) for key, values in lists.items()]
    settings = ["process_isolation = forkserver", "use_git_change_detection = false", "timeout_multiplier = 10.0",
                "timeout_constant = 3.0"]
    (module.folder / "setup.cfg").write_text("\n".join(["[mutmut]", *settings, *lines]) + "\n", encoding="utf-8")


def _work(module: Module, processes: int) -> None:
    """Make the module's mutants and run the tests against those that are not killed yet."""
    from mutmut.__main__ import _run
    from mutmut.mutation.data import SourceFileMutationData

    _adapt_mutmut()
    for name in module.imports:
        importlib.import_module(name)
    data = SourceFileMutationData(path=Path(module.path))
    if Path("mutants", f"{module.path}.meta").exists():
        data.load()
        data.exit_code_by_key = {key: code if code in (1, 3) else None for key, code in data.exit_code_by_key.items()}
        data.save()
    _run([], processes)


def _adapt_mutmut() -> None:
    """Have mutmut 3.8.1 mutate functions with the decorators in TRANSPARENT, no prose, and run quick tests first."""
    import libcst as cst
    from mutmut.mutation import file_mutation
    from mutmut.runners.harness import PytestRunner
    from mutmut.state import state

    def adaptable(function: Any) -> bool:
        code = cst.Module([]).code_for_node
        names = [code(decorator.decorator).partition("(")[0] for decorator in function.decorators]
        return bool(names) and all(name in TRANSPARENT for name in names)

    def arguments(self: Any, tests: Iterable[str]) -> list[str]:
        if not tests:
            return [*run_all(self, tests)]
        return ["-x", "-q", *sorted(tests, key=lambda test: state().duration_by_test.get(test, 0))]

    run_all = PytestRunner._pytest_args_regular_run
    skip = file_mutation.MutationVisitor._skip_node_and_children
    arrange = file_mutation.function_trampoline_arrangement

    def skip_node(self: Any, node: Any) -> bool:
        if isinstance(node, cst.SimpleString) and " " in node.value:
            return True
        if isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value == "PydanticCustomError":
            return True  # its type, which nothing reads, and its words
        if isinstance(node, cst.FunctionDef) and adaptable(node):
            return bool(skip(self, node.with_changes(decorators=[])))
        return bool(skip(self, node))

    def arrange_function(function: Any, mutants: Iterable[Any], class_name: str | None) -> Any:
        declared, nodes, assigned, names = arrange(function, mutants, class_name)
        if adaptable(function):  # the original and its mutants are called through the one that is decorated
            nodes = [nodes[0], *(node.with_changes(decorators=[]) for node in nodes[1:])]
        return declared, nodes, assigned, names

    PytestRunner._pytest_args_regular_run = arguments
    file_mutation.MutationVisitor._skip_node_and_children = skip_node
    file_mutation.function_trampoline_arrangement = arrange_function


def _report(module: Module) -> None:
    """Print each survivor's diff, an empty line, and the figures of the module."""
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    data = SourceFileMutationData(path=Path(module.path))
    data.load()
    counts: Counter[str] = Counter()
    for name, code in data.exit_code_by_key.items():
        status = status_by_exit_code[code]
        if code == UNUSABLE:
            sys.exit(f"error: {name}: pytest refused the names of the tests: are they the same in each collection?")
        if status in ("killed", "timeout"):
            counts[status] += 1
            continue
        diff = get_diff_for_mutant(name, path=data.path)
        changed = [line for line in diff.splitlines() if line[:1] in "+-" and not line.startswith(("+++", "---"))]
        function = name.rpartition(".")[2].partition("__mutmut_")[0].removeprefix("x_")
        why = module.survivors.get(changed[-1][1:].strip()) or module.survivors.get(function)
        counts["explained" if why else "survived"] += 1
        if not why:
            print(f"{name}: {status}", *changed, sep="\n")
    total = sum(counts.values())
    row = total, *(counts[status] for status in ("killed", "timeout", "survived", "explained"))
    print(f"\n\n{module.path}", *row, f"{100 * (counts['killed'] + counts['timeout']) / total:.1f}", end="")


if __name__ == "__main__":
    if sys.argv[1:2] in (["--worker"], ["--result"]):
        del sys.path[0]  # the folder of this file: `tests` has to be the copy
        this = read_modules()[sys.argv[2]]
        if sys.argv[1] == "--worker":
            _work(this, int(sys.argv[3]))
        else:
            _report(this)
    else:
        sys.exit(main(sys.argv[1:]))
