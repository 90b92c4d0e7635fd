"""The files of an earlier commit in a folder of their own, for comparison. Reads the repository and changes nothing:
not the working tree, not the index.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jobs.core.errors import UserError

# What a git hook has in its environment. It would point the commands below at other files than those of their folder.
OF_HOOKS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR")
# No lock on the index, no question for a password, no download of what a partial clone lacks.
QUIET = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_LFS_SKIP_SMUDGE": "1",
         "LC_ALL": "C"}
# The temporary index must be one whole file, and hold every file.
PLAIN = ("-c", "core.splitIndex=false", "-c", "core.sparseCheckout=false", "-c", "core.fsmonitor=false")


class GitError(Exception):
    """What git wrote, on one line."""


@dataclass(frozen=True)
class Revision:
    """A commit to compare with."""

    name: str  # as a person writes it, e.g. origin/main
    commit: str  # 40 hex digits
    repository: Path  # the top folder of the working tree

    def __str__(self) -> str:
        return self.name if self.commit.startswith(self.name) else f"{self.name} ({self.commit[:7]})"


def find(folder: Path, name: str | None) -> Revision | str:
    """The revision that a person named; by default the upstream of the current branch, else HEAD.

    Returns:
        why there is none, if none was named: no git, no repository or no commit.
    Raises:
        UserError: the named revision does not exist.
    """
    try:
        top = Path(git(folder, "rev-parse", "--show-toplevel"))
    except GitError as error:
        if name is not None:
            raise UserError(f"--since {name}: {folder}: {error}") from None
        return f"{folder}: {error}"
    try:
        if name is None:
            name = upstream(folder) or "HEAD"
            return Revision(name, commit(folder, name), top)
    except GitError:
        return f"{top}: has no commit yet"
    try:
        return Revision(name, commit(folder, name), top)
    except GitError:
        shallow = ("This clone is shallow: fetch more of the history, e.g. git fetch --deepen=100, or fetch-depth in "
                   "CI" if git(folder, "rev-parse", "--is-shallow-repository") == "true"
                   else "Name a commit, a tag or a branch of this clone, e.g. origin/main")
        raise UserError(f"--since {name}: {top} has no such commit. {shallow}") from None


def upstream(folder: Path) -> str | None:
    """The upstream of the current branch, e.g. origin/main; None if there is none."""
    try:
        return git(folder, "rev-parse", "--abbrev-ref", "--symbolic-full-name", "@{upstream}")
    except GitError:
        return None


def commit(folder: Path, name: str) -> str:
    return git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")


def export(revision: Revision, target: Path) -> None:
    """Write all files of the revision below `target`, which must not exist.

    Not `git archive`, which leaves out what .gitattributes marks as `export-ignore`.

    Raises:
        GitError: git cannot.
    """
    target.mkdir()
    index = target.with_name(f"{target.name}.index")
    git(revision.repository, *PLAIN, "read-tree", revision.commit, index=index)
    git(revision.repository, *PLAIN, "checkout-index", "--all", "--quiet", f"--prefix={target}/", index=index)


def notes(revision: Revision, folders: Iterable[Path]) -> list[str]:
    """What a person should know about the comparison of these folders of the working tree with the revision."""
    found = []
    inside = [str(folder) for folder in folders if folder.is_relative_to(revision.repository)]
    changed = git(revision.repository, "status", "--porcelain", "--untracked-files=all", "--", *inside).splitlines()
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        files = ", ".join(line[3:] for line in changed[:3])
        found.append(f"not committed, and so not part of a push yet: {files}{more}")
    ahead = git(revision.repository, "rev-list", "--count", f"HEAD..{revision.commit}", "--")
    if ahead != "0":
        commits = "a commit" if ahead == "1" else f"{ahead} commits"
        found.append(f"{revision} has {commits} that HEAD does not have; what they changed appears as undone. Merge or "
                     "rebase first, or compare with the merge base")
    return found


def git(folder: Path, *arguments: str, index: Path | None = None) -> str:
    """The output of a git command.

    Args:
        index: the index file to use instead of the repository's.
    Raises:
        GitError: git is not installed, or the command failed.
    """
    environment = {key: value for key, value in os.environ.items() if key not in OF_HOOKS} | QUIET
    if index:
        environment["GIT_INDEX_FILE"] = str(index)
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], env=environment, capture_output=True, text=True,
                              errors="surrogateescape", check=False)
    except FileNotFoundError:
        raise GitError("git is not installed") from None
    if done.returncode:
        message = done.stderr.strip().splitlines() or [f"git {arguments[0]} failed"]
        raise GitError(message[0].removeprefix("fatal: "))
    return done.stdout.strip("\n")
