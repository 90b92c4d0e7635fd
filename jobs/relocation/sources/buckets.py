"""What buckets share: objects, folders and globs of them, and how each is pinned by a sha256.

- `s3://BUCKET/KEY` is one object, pinned by the sha256 of its content.
- `s3://BUCKET/FOLDER/` is the objects below a folder. If it has a file `SHA256SUMS`, as `sha256sum * > SHA256SUMS`
  writes it, the pin is the sha256 of that file: it has the digest of every other file, so a part of the folder can be
  fetched and verified, and the bucket need not be listed. A model's folder must have it. Otherwise the folder is
  listed, and its pin is that of the same files in a `file:` folder (`interface.folder_pin`).
- `s3://BUCKET/FOLDER/*.jsonl` is the objects whose names match, pinned like a listed folder.

All requests for an object name the version of it that was found first, so that its parts belong to one content.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jobs.core.declarations import Loaded, Source
from jobs.core.environment import LoadedEnvironment
from jobs.core.errors import UserError
from jobs.core.files import human_bytes
from jobs.relocation import connection
from jobs.relocation.connection import Stream, classified, mismatch, patiently, shown
from jobs.relocation.sources.interface import SUMS, Item, check_names, content_sha256, folder_pin

log = logging.getLogger("jobs")

SUMS_BYTES = 16 * 2**20  # 150,000 files
LINE = re.compile(r"(?P<sha256>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Object:
    """An object in a bucket, and the headers that ask for exactly this version of it."""

    key: str
    size: int
    version: Mapping[str, str]


class Answer(Exception):
    """A store's answer that is not the object; `connection.classify_error` knows what it means."""

    def __init__(self, status: int, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{status} {code}".strip())
        self.status = status
        self.headers = headers or {}


class Body:
    """The body of an answer, as urllib3 has it: `read` gives what has arrived, and another thread can end it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def read(self, amount: int) -> bytes:
        return bytes(self.answer.read1(amount, decode_content=False))

    def close(self) -> None:
        self.answer.close()

    def abort(self) -> None:
        self.answer.shutdown()


class Buckets(ABC):
    """A kind of buckets: an `interface.Implementation`. A subclass lists, finds and opens objects, and raises what
    `connection.classify_error` knows."""

    ADVICE: str  # what to do when the store denies access
    LISTING: str  # the right to list a bucket
    UPLOAD: str  # the command that copies a file into a bucket

    @abstractmethod
    def list_objects(self, bucket: str, prefix: str) -> Iterator[Object]:
        """The objects whose keys begin with `prefix`."""

    @abstractmethod
    def find_object(self, bucket: str, key: str) -> Object | None:
        """One object; None if it is not there."""

    @abstractmethod
    def open_range(self, url: str, start: int, end: int | None, headers: Mapping[str, str]) -> Stream:
        """An object from byte `start` on, in the version that `headers` name: one request, read as a stream."""

    def files(self, loaded: Loaded, source: Source) -> list[Item]:
        """The files that the source holds, in the versions that they have now."""
        bucket, folder, pattern = _parts(loaded, source)
        if not pattern:
            sums = self._read_sums(loaded, source)
            if sums is not None:
                _require_pinned(loaded, source, sums)
                return self._summed(loaded, source, parse_sums(sums, f"{source.scheme}://{bucket}/{folder}{SUMS}"))
        elif not WILD.search(pattern):
            check_names(source, [pattern])
            found = patiently(lambda: self.find_object(bucket, folder + pattern), shown(source.source), self.ADVICE)
            if found is None:
                raise UserError(f"{shown(source.source)}: not found (404). Is there a typo in the name? The name of a "
                                "folder ends with /")
            return [_item(source, bucket, folder, found, source.sha256, loaded.path.name)]
        return [_item(source, bucket, folder, each, None, loaded.path.name) for each in self._selected(loaded, source)]

    def find_pin(self, loaded: Loaded, source: Source) -> str:
        """The pin that the source has now: every object is read once, unless the folder has a SHA256SUMS."""
        bucket, folder, pattern = _parts(loaded, source)
        if not pattern:
            sums = self._read_sums(loaded, source)
            if sums is not None:
                parse_sums(sums, f"{source.scheme}://{bucket}/{folder}{SUMS}")
                return hashlib.sha256(sums).hexdigest()
        items = self.files(loaded, source)
        size = human_bytes(sum(item.size or 0 for item in items))
        log.info("%s: reading %d objects (%s) for its pin", shown(source.source), len(items), size)
        with ThreadPoolExecutor(max_workers=connection.CONNECTIONS) as pool:
            digests = list(pool.map(
                lambda item: content_sha256(item.url, self.open_range, self.ADVICE, item.headers), items))
        if pattern and not WILD.search(pattern):
            return digests[0]
        return folder_pin(zip([item.name for item in items], digests, strict=True))

    def _read_sums(self, loaded: Loaded, source: Source) -> bytes | None:
        """The content of the folder's SHA256SUMS; None if it has none and need not have it."""
        bucket, folder, _ = _parts(loaded, source)
        where = f"{source.scheme}://{bucket}/{folder}"
        is_model = isinstance(loaded, LoadedEnvironment)

        def request() -> bytes | None:
            try:
                with classified(where + SUMS, self.ADVICE):
                    stream = self.open_range(where + SUMS, 0, None, {})
            except UserError as error:
                status = error.__cause__.status if isinstance(error.__cause__, Answer) else None
                if status not in (403, 404):
                    raise
                if not is_model:
                    return None  # where even this is denied, listing will be, too
                # Where the bucket may not be listed, S3 denies access to an object that is not there.
                why = "is not there (404)" if status == 404 else "is not there, or may not be read (403)"
                raise UserError(f"{where}{SUMS}: {why}. A model's folder needs this list of the digests of its files. "
                                f"In a copy of the folder that you trust, run: sha256sum * > {SUMS}; {self.UPLOAD} "
                                f"{SUMS} {where}{SUMS}{f' . {self.ADVICE}' if status == 403 else ''}") from None
            content = b""
            try:
                while chunk := stream.read():
                    content += chunk
                    if len(content) > SUMS_BYTES:
                        raise UserError(f"{where}{SUMS}: has more than {SUMS_BYTES >> 20} MiB: not a list of digests")
                stream.require_end()
            finally:
                stream.raw.close()
            return content

        return patiently(request, where + SUMS, self.ADVICE)

    def _summed(self, loaded: Loaded, source: Source, sums: Mapping[str, str]) -> list[Item]:
        """The files that a SHA256SUMS lists, which must be there."""
        bucket, folder, _ = _parts(loaded, source)
        check_names(source, sums)

        def find(name: str) -> Item:
            url = f"{source.scheme}://{bucket}/{folder}{name}"
            found = patiently(lambda: self.find_object(bucket, folder + name), shown(url), self.ADVICE)
            if found is None:
                raise UserError(f"{url}: {SUMS} lists it, but it is not there (404). Upload it, or write {SUMS} again "
                                "and run: python -m jobs pin --update")
            return _item(source, bucket, folder, found, sums[name], SUMS)

        with ThreadPoolExecutor(max_workers=connection.CONNECTIONS) as pool:
            return list(pool.map(find, sums))

    def _selected(self, loaded: Loaded, source: Source) -> list[Object]:
        """The objects that a folder or glob holds. Hidden files do not count, as in a `file:` folder."""
        bucket, folder, pattern = _parts(loaded, source)
        prefix = folder + WILD.split(pattern)[0]
        advice = f"{self.ADVICE}. Listing a folder also needs {self.LISTING}, unless it has a {SUMS}"

        def request() -> list[Object]:
            found = []
            for each in self.list_objects(bucket, prefix):
                name = each.key.removeprefix(folder)
                hidden = any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
                folder_marker = name == "" or name.endswith("/")
                if not hidden and not folder_marker and (not pattern or matches(name, pattern)):
                    found.append(each)
            return found

        found = patiently(request, shown(source.source), advice)
        if not found:
            nothing = "no object matches" if pattern else "the folder holds no objects"
            raise UserError(f"{shown(source.source)}: {nothing}. Is there a typo in the name?")
        check_names(source, [each.key.removeprefix(folder) for each in found])
        return sorted(found, key=lambda each: each.key)


def parse_sums(content: bytes, where: str) -> dict[str, str]:
    """The digest of every file that a SHA256SUMS lists, by its name; of the list itself it can have none.

    Raises:
        UserError: naming the line that is not as sha256sum writes it.
    """
    found: dict[str, str] = {}
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{where}: is not UTF-8. Make it with: sha256sum * > {SUMS}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = LINE.fullmatch(line.removesuffix("\r"))
        if not match:
            raise UserError(f"{where}: line {number} is not a digest and a name. Make it with: sha256sum * > {SUMS}")
        name = match["name"].removeprefix("./")
        if name in found and found[name] != match["sha256"].lower():
            raise UserError(f"{where}: line {number} has a second digest for {name}. Make it with: "
                            f"sha256sum * > {SUMS}")
        found[name] = match["sha256"].lower()
    found.pop(SUMS, None)  # written before it was complete
    if not found:
        raise UserError(f"{where}: lists no files. Make it with: sha256sum * > {SUMS}")
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a path matches a glob: `*` does not cross a `/`, and `**` is any number of folders."""
    @functools.cache
    def rest(names: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
        if not patterns:
            return not names
        if patterns[0] == "**":
            return rest(names, patterns[1:]) or (bool(names) and rest(names[1:], patterns))
        return bool(names) and fnmatch.fnmatchcase(names[0], patterns[0]) and rest(names[1:], patterns[1:])

    return rest(tuple(name.split("/")), tuple(pattern.split("/")))


def split_url(url: str) -> tuple[str, str]:
    """Bucket and key of an object's URL."""
    bucket, _, key = url.partition("://")[2].partition("/")
    return bucket, key


def range_header(start: int, end: int | None) -> dict[str, str]:
    """The header for bytes `start` to `end`, without that one; none for the whole object."""
    return {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}


def _parts(loaded: Loaded, source: Source) -> tuple[str, str, str]:
    """Bucket, folder (empty or with a `/` at its end), and what is selected in it: nothing for all of it."""
    bucket, path = split_url(source.source)
    if isinstance(loaded, LoadedEnvironment):  # a model, which is a folder
        return bucket, f"{path.rstrip('/')}/".lstrip("/"), ""
    wild = WILD.search(path)
    end = path.rfind("/", 0, wild.start() if wild else len(path)) + 1
    return bucket, path[:end], path[end:]


def _require_pinned(loaded: Loaded, source: Source, sums: bytes) -> None:
    found = hashlib.sha256(sums).hexdigest()
    if found != source.sha256:
        raise UserError(mismatch(f"{shown(source.source)}: {SUMS}", loaded.path.name, str(source.sha256), found))


def _item(source: Source, bucket: str, folder: str, found: Object, sha256: str | None, pinned_in: str) -> Item:
    return Item(found.key.removeprefix(folder), f"{source.scheme}://{bucket}/{found.key}", found.size, sha256,
                pinned_in=pinned_in, headers=found.version)
