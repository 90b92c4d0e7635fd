"""How a value of a file is shown in a line for people."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

from jobs.core import strict_yaml

LONGEST = 60  # characters
PASSWORD = re.compile(r"(?<=://)[^/@\s]*@")
QUERY = re.compile(r"(://[^?#\s]*)\?[^#\s]*")  # of a URL; it may be a signature that gives access
DIGEST = re.compile(r"[0-9a-f]{17,}")
SHOWN_DIGITS = 12


def shown(value: Any) -> str:
    """A value on one line: digests short, and nothing of a URL that may be secret."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True, exclude_defaults=True)
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {shown(each)}" for key, each in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(map(shown, value)) + "]"
    elif value is None or isinstance(value, bool):
        text = "none" if value is None else str(value).lower()
    else:
        text = QUERY.sub(r"\1?…", PASSWORD.sub("", str(value)))
        text = DIGEST.sub(lambda digits: f"{digits[0][:SHOWN_DIGITS]}…", text)
    text = strict_yaml.one_line(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST - 1]}…"
