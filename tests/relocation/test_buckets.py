"""Promises of globs and of lists of digests, whichever bucket they are in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jobs.core.errors import UserError
from jobs.relocation.sources.buckets import matches, parse_sums

A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize(("pattern", "chosen"), [
    ("*", "a.jsonl b.csv"), ("*.jsonl", "a.jsonl"), ("?.csv", "b.csv"), ("[ab].*", "a.jsonl b.csv"),
    ("*/*", "x/c.jsonl"), ("x/**", "x/c.jsonl x/y/d.jsonl"), ("**/*.jsonl", "a.jsonl x/c.jsonl x/y/d.jsonl"),
    ("**/y/*", "x/y/d.jsonl"), ("*.parquet", ""),
])
def test_a_star_does_not_cross_a_folder_and_two_do(pattern: str, chosen: str) -> None:
    names = ["a.jsonl", "b.csv", "x/c.jsonl", "x/y/d.jsonl"]
    assert [name for name in names if matches(name, pattern)] == chosen.split()


def test_a_list_may_have_the_line_ends_of_another_system_and_names_what_it_will() -> None:
    assert parse_sums(f"{A}  a\r\n\r\n{B} *b\u2028c\r\n".encode(), "SHA256SUMS") == {"a": A, "b\u2028c": B}


def test_a_list_is_read_as_sha256sum_writes_it(tmp_path: Path) -> None:
    for name in ("a.json", "with space", "ünïcode"):
        (tmp_path / name).write_text(name)
    for command in ("sha256sum *", "sha256sum --binary *",
                    "find . -type f ! -name SHA256SUMS | xargs -d '\\n' sha256sum", "sha256sum *"):
        # The last one finds the list itself among the files.
        subprocess.run(["sh", "-c", f"{command} > SHA256SUMS"], cwd=tmp_path, check=True)
        found = parse_sums((tmp_path / "SHA256SUMS").read_bytes(), "SHA256SUMS")
        assert sorted(found) == ["a.json", "with space", "ünïcode"]


@pytest.mark.parametrize(("content", "message"), [
    (b"", "lists no files"), (f"{A}  SHA256SUMS\n".encode(), "lists no files"),
    (f"{A}  a\nSHA256 (b) = {B}\n".encode(), "line 2 is not a digest and a name"),
    (f"{A[1:]}  a\n".encode(), "line 1 is not"), (f"{A}  a\n{B}  ./a\n".encode(), "line 2 has a second digest for a"),
    (f"\\{A}  a\\nb\n".encode(), "line 1 is not"), (b"\xff", "is not UTF-8"), (b"<html>", "line 1 is not"),
])
def test_a_list_that_is_not_as_sha256sum_writes_it_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=f"s3://data/x/SHA256SUMS: {message}.*sha256sum \\* > SHA256SUMS"):
        parse_sums(content, "s3://data/x/SHA256SUMS")
