"""https:// and http://: one file behind a URL, pinned by its sha256. The hub's files are opened here, too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from jobs.core.declarations import Loaded, Source
from jobs.core.errors import UserError
from jobs.relocation.connection import SILENCE_S, Interrupted, Stream, shown
from jobs.relocation.sources.interface import content_sha256, single_file

ADVICE = ("Is it gated or private? Then accept its terms and set HF_TOKEN (or sign the URL). Or is the name misspelt? "
          "Hubs give the same answer for both")
CONTENT_RANGE = re.compile(r"bytes (?P<start>\d+)-(?P<end>\d+)/(?P<total>\d+|\*)")

files = single_file


def find_pin(loaded: Loaded, source: Source) -> str:
    """The sha256 of what the URL gives."""
    return content_sha256(source.source, open_range, ADVICE)


def open_range(url: str, start: int, end: int | None, headers: Mapping[str, str]) -> Stream:
    """One GET request, read as a stream; of a part of the file, if the server answers with exactly that."""
    import aiohttp
    import fsspec

    filesystem = fsspec.filesystem("http", encoded=True, client_kwargs={
        # aiohttp's default ends every download after five minutes.
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S),
        "trust_env": True,  # HTTPS_PROXY
        # Signed URLs, ours (`encoded`) and those that we are sent on to, are valid only exactly as written.
        "requote_redirect_url": False})
    try:
        _ = urlsplit(url).port
    except ValueError as error:
        raise UserError(f"{shown(url)}: not a URL that can be opened: {error}") from None
    part_wanted = start > 0 or end is not None
    wanted = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if part_wanted else {}
    request = {**headers, "Accept-Encoding": "identity", **wanted}
    try:
        # block_size 0 is one request read as a stream; any size keeps fsspec from sending a HEAD request first.
        raw = filesystem.open(url, "rb", block_size=0, size=1, headers=request)
    except aiohttp.ClientResponseError as error:
        if error.status == 416 and part_wanted:  # there is nothing behind what we have; only a fresh start shows why
            return open_range(url, 0, None, headers)
        raise
    except ValueError as error:
        if isinstance(error, aiohttp.InvalidURL):
            raise
        raise Interrupted(f"this, or what the server redirects to, is no URL: {error}") from None
    answered = raw.r.headers
    if part_wanted and raw.r.status == 206:
        part = CONTENT_RANGE.fullmatch(answered.get("Content-Range", ""))
        if not part or int(part["start"]) != start or not _complete(part, end):
            raw.close()
            return open_range(url, 0, None, headers)
        return Stream(raw, shown(url), ADVICE, start, int(part["total"]) if part["total"] != "*" else None, end,
                      _version(answered))
    total = "" if "Content-Encoding" in answered else answered.get("Content-Length", "")
    return Stream(raw, shown(url), ADVICE, 0, int(total) if total.isdigit() else None, None, _version(answered))


def _complete(part: re.Match[str], end: int | None) -> bool:
    """Whether a part goes on to where it was requested to end; a server that does not send the total may."""
    last = int(part["end"]) + 1
    if end is not None and last >= end:
        return True
    return last == int(part["total"]) if part["total"] != "*" else end is None


def _version(answered: Mapping[str, str]) -> str | None:
    """The ETag, if it is a strong one: the same for the same bytes."""
    tag = answered.get("ETag", "").strip()
    return tag if tag.startswith('"') else None
