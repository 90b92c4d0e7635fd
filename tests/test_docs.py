"""Promises of README and docs: lines fit a terminal, links and anchors resolve, and the index lists every page."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from jobs.tools.pods import CHECKOUT

COLUMNS = 100
FOLDERS = ("argocd", "base", "benchmarks", "jobs", "kubeflow", "overlays", "serving")
# What the pages let a reader make.
OF_USERS = {"overlays/mine", "overlays/team-a", "overlays/team-a/kustomization.yaml", "keys.yaml"}
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md")), CHECKOUT / "tests" / "e2e" / "README.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`[^`]*`")


def prose(text: str) -> list[str]:
    """The lines of a page; lines of code blocks are empty, so that the numbers of the others stay."""
    lines, fence = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fence, line = not fence, ""
        lines.append("" if fence else line)
    return lines


def too_long(text: str) -> list[str]:
    """Lines above the limit, with their numbers; not those of tables, and not what has no place for a line break."""
    return [f"{number}: {line}" for number, line in enumerate(prose(text), 1)
            if len(line) > COLUMNS and not line.lstrip().startswith("|") and " " in line.strip()[:COLUMNS]
            and not LINK.fullmatch(line.strip().lstrip("-* "))]


def links(text: str) -> list[str]:
    """The targets of all relative links and images."""
    text = CODE.sub("", "\n".join(prose(text)))
    found = [*LINK.findall(text), *re.findall(r'(?:src|href)="([^"]*)"', text)]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them: a repeated heading gets a number."""
    seen: Counter[str] = Counter()
    found = set()
    for line in prose(text):
        if heading := re.match(r"#+ (.*)", line):
            title = LINK.sub(lambda link: link[0][1:link[0].index("]")], heading[1])
            slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return found


def broken(page: Path) -> list[str]:
    """The relative links of a page whose file or heading does not exist."""
    found = []
    for target in links(page.read_text()):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            found.append(target)
    return found


def missing(text: str) -> list[str]:
    """The files and folders of this checkout that a page names and that do not exist: paths from its root, and the
    names of YAML files. What has a placeholder in capitals is left out, and what is not in git, such as `.local`."""
    folders = {path.name for path in CHECKOUT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    named = [each.strip("`").rstrip("/") for each in CODE.findall("\n".join(prose(text)))]
    paths = [each for each in named if re.fullmatch(r"[a-z0-9_./-]+", each) and each.partition("/")[0] in folders]
    files = {path.name for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*.yaml")}
    return sorted({path for path in paths if not (CHECKOUT / path).exists()} - OF_USERS | {
        name for name in named if re.fullmatch(r"[a-z0-9-]+\.yaml", name) and name not in files | OF_USERS})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_prose_has_at_most_100_columns(page: Path) -> None:
    assert too_long(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_every_relative_link_and_anchor_resolves(page: Path) -> None:
    assert broken(page) == []


def test_the_index_lists_every_page_of_docs() -> None:
    docs = CHECKOUT / "docs"
    listed = {target for target in links((docs / "README.md").read_text()) if not re.search(r"^\.\./|#", target)}
    assert listed == {str(page.relative_to(docs)) for page in docs.rglob("*.md")} - {"README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_pages_name_only_files_that_exist(page: Path) -> None:
    assert missing(page.read_text()) == []


def test_code_names_only_pages_that_exist() -> None:
    files = [CHECKOUT / "Makefile", *(file for folder in FOLDERS for file in (CHECKOUT / folder).rglob("*")
                                      if file.suffix in {".py", ".yaml"} or file.name == "Dockerfile")]
    named = {page for file in files for page in re.findall(r"docs/[\w./-]+\.md", file.read_text())}
    assert "docs/registries.md" in named
    assert [page for page in sorted(named) if not (CHECKOUT / page).is_file()] == []


def test_the_checks_find_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("\n".join([
        "# A `page`: one, two", "word " * 21, "", f"| {'cell ' * 30}|", "```sh", "code " * 30, "[a](none.md)", "```",
        "[a](none.md) [b](#a-page-one-two) [c](#none) [d](page.md#a-page-one-two) `[e](none)`",
        "[f](https://example.com/none) " + "word " * 21, "## Twice", "## Twice", "[g](#twice-1) [h](#twice-2)",
        '<img src="none.png">', "`argocd/project.yaml` `argocd/none.yaml` `jobs/NAME.py` `none.yaml` `keys.yaml`"]))
    assert [line.partition(":")[0] for line in too_long(page.read_text())] == ["2", "10"]
    assert missing(page.read_text()) == ["argocd/none.yaml", "none.yaml"]
    assert broken(page) == ["none.md", "#none", "#twice-2", "none.png"]
