"""What a push of an overlay would do: which artifacts are new and why, which Jobs run, whether serving restarts.

Compares the files in the working tree, also those that are not committed, with those of REVISION. By default that is
the upstream of the current branch, as it was last fetched: what a push sends. A branch without an upstream is compared
with HEAD: what is not committed yet. In CI, name the commit that the pull request is merged into, e.g.
`--since HEAD^1` on GitHub's merge commit; docs/plan.md has complete examples. Needs git and kubectl, no network and
no cluster, and changes nothing. The exit code is 0 whether or not anything changes, and 2 for invalid files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.core.errors import UserError

if TYPE_CHECKING:
    from jobs.core.imported import LoadedAdapter
    from jobs.tools.changes_report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--since", metavar="REVISION",
                        help="the commit, tag or branch to compare with (default: the upstream of the current branch, "
                             "else HEAD)")
    # `dest`: the option of the stages with the same name comes before the command, and has a default.
    parser.add_argument("--volumes", type=Path, metavar="DIR", dest="plan_volumes",
                        help="also show what is on the volumes: a folder with a folder for each, as a cluster mounts "
                             "them (/volumes) and `jobs local` keeps them (.local/NAME/volumes)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="write Markdown, for a comment on a pull request")
    form.add_argument("--json", action="store_true", help="write JSON, for programs (docs/plan.md describes the keys)")


def run(args: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        UserError: the overlay's files are invalid or do not render, or a named revision or folder does not exist. If
            some adapters' files are valid, the plan of these is printed before.
    """
    from jobs.tools import changes_report

    report = make(args.overlay, args.since, args.plan_volumes)
    form = changes_report.as_json if args.json else changes_report.markdown if args.markdown else changes_report.table
    sys.stdout.write(form(report))
    sys.stdout.flush()
    if report.problems:
        raise UserError("\n".join(report.problems))


def make(path: Path, since: str | None = None, volumes: Path | None = None) -> Report:
    """Compare the overlay in the working tree with an earlier revision of it. Adapters whose files are invalid are
    left out, as long as there are others.

    Args:
        path: the overlay's folder.
        since: the revision; by default the upstream of the current branch, else HEAD.
        volumes: also look there for what exists.
    Raises:
        UserError: as `run`.
    """
    from jobs.tools import changes, earlier, entries, kustomization, overlay, pods, revision
    from jobs.tools.changes_report import Report

    files = overlay.find(overlay.find(path).folder)
    shared, loaded, problems = overlay.read(files)
    if shared is None or (problems and not loaded):
        raise UserError("\n".join(problems))
    new, invalid = overlay.Overlay(files.folder, shared, loaded), set(files.names) - loaded.keys()
    if volumes is not None:
        changes.check_volumes(volumes)
    found = revision.find(new.folder, since)
    notes: list[str] = []
    before = None
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(1) as pool:
        rendering = pool.submit(pods.render, new.folder)  # takes seconds for many adapters
        if isinstance(found, revision.Revision):
            if since is None and found.name == "HEAD":
                notes.append("the current branch has no upstream: compared with HEAD, which has all that is committed. "
                             "Name what the cluster follows, e.g. --since origin/main")
            before = earlier.read(found, new.folder, Path(place), notes)
        else:
            notes.append(f"nothing to compare with: {found}")
        adapters = {each.pipeline.adapter: each.pipeline for each in new.adapters.values()}
        after = changes.Side(new.environment.environment, adapters, rendering.result())
        if isinstance(found, revision.Revision):
            notes += revision.notes(found, [file.parent for file in kustomization.kustomizations(new.folder)])
    notes += [problem.message for problem in entries.problems(new.folder, new.adapters)]
    notes += [note for each in new.adapters.values() for note in _wrong_pins(each)]
    notes += [f"left out: {problem}" for problem in problems]
    compared = changes.without(changes.compare(before, after, volumes), invalid)
    since_revision = found if isinstance(found, revision.Revision) else None
    return Report(new.folder, since_revision, [*notes, *compared.notes], compared, problems)


def _wrong_pins(loaded: LoadedAdapter) -> Iterator[str]:
    """Data in git that changed while its pin did not: the digests below would be those of the data before."""
    from jobs.tools import check

    for key, source in check.data_in_git(loaded).items():
        try:
            check.require_pin(loaded, key, source)
        except UserError as error:
            yield f"its relocation would fail: {error}"
