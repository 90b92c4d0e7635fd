"""The keys of clients: which models each may use. `python -m serving.keys --help` makes one.

An adapter has learned its team's data, so each team needs a key of its own. The mounted Secret `serving-keys` has a
file `keys.yaml`, with the sha256 of each key and the models that it opens:

    keys:
    - name: team-a
      sha256: "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
      models: [seville-hotels]

`Keys` follows the file while the server runs. docs/keys.md explains the format and the decisions.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator
from pydantic_core import PydanticCustomError

from jobs.core import declarations
from jobs.core.command import run_command
from jobs.core.declarations import Strict
from jobs.core.errors import UserError
from jobs.core.files import read_plain_file
from jobs.core.strict_yaml import CONFIG_MAP_BYTES

log = logging.getLogger("serving")

FILE = "/etc/serving-keys/keys.yaml"
POLL_SECONDS = 0.5
KEY_BYTES = 32  # of a new key: nobody can try so many, so the plain sha256 of a key is safe to store
PREFIX = "sk-lora-"  # scanners for leaked secrets and people recognize it
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
MODEL_LENGTH = 256
EVERYTHING: Literal["*"] = "*"
OF_NOTHING = hashlib.sha256().hexdigest()  # what `sha256sum` prints when the key was an unset variable


class Entry(Strict):
    """A key in `keys.yaml`."""

    name: str  # for people and metrics
    sha256: str  # of the key, in hex
    models: Literal["*"] | list[str] | None = None  # aliases, and the base model's name; `*`: all of them
    # Whether it may read /metrics, which shows what all teams do. Without such a key, everybody may.
    metrics: bool = False

    @model_validator(mode="before")
    @classmethod
    def _check_entry(cls, values: Any) -> Any:
        # Not in a validator of `sha256`: its message would quote the value, which may be the key itself.
        found = values.get("sha256") if isinstance(values, dict) else None
        if found is not None and not (isinstance(found, str) and re.fullmatch(r"[0-9a-fA-F]{64}", found)):
            raise PydanticCustomError("sha256", "`sha256` must be 64 hex digits in quotes: the hash of the key, never "
                                                "the key itself", {})
        if isinstance(found, str) and found.lower() == OF_NOTHING:
            raise PydanticCustomError("sha256", "`sha256` is the hash of an empty key", {})
        if isinstance(values, dict) and values.get("models") is None and values.get("metrics") is not True:
            raise PydanticCustomError("models", "`models` is missing", {})
        return values

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise PydanticCustomError("name", "must be 1 to 63 of a-z, 0-9 and -, not at the ends", {})
        return name

    @field_validator("models", mode="plain")
    @classmethod
    def _check_models(cls, models: Any) -> Any:
        if models in (None, EVERYTHING) or (isinstance(models, list) and models and all(map(_is_model, models))):
            return models
        raise PydanticCustomError("models", 'must be a list of model names, or "*" for all models', {})


def _is_model(value: Any) -> bool:
    """Whether a value can be the name of an alias or of the base model."""
    return (isinstance(value, str) and 0 < len(value) <= MODEL_LENGTH and value.isprintable()
            and value == value.strip() and value != EVERYTHING)


class File(Strict):
    """The content of `keys.yaml`."""

    keys: list[Entry]


@dataclass(frozen=True)
class Key:
    """Who sends a request.

    Args:
        digest: sha256 of the key; empty if no key is needed.
        models: what it may use; None: everything.
        metrics: whether it may read /metrics where that needs a key.
    """

    name: str
    digest: bytes
    models: frozenset[str] | None = None
    metrics: bool = False

    def may_use(self, model: str) -> bool:
        """Whether the key opens the model. The name must be equal byte for byte; nothing is normalized."""
        return self.models is None or model in self.models


# Neither can be the name of an entry.
ANYBODY = Key("(none)", b"")  # no key is configured
SINGLE = "VLLM_API_KEY"


def load(file: Path) -> dict[bytes, Key]:
    """Read and validate `keys.yaml`; returns its keys by their sha256.

    Raises:
        UserError: with one line for each problem: file, line, key, what is wrong. It does not quote a wrong `sha256`.
    """
    document = declarations.read(file, "keys")
    entries = declarations.validate(document, File, document.values).keys
    problems = []
    for what, values in (("name", [each.name for each in entries]),
                         ("sha256", [each.sha256.lower() for each in entries])):
        first: dict[str, int] = {}
        for i, value in enumerate(values):
            if first.setdefault(value, i) != i:
                where = document.line_of(["keys", str(i), what])
                earlier = document.line_of(["keys", str(first[value]), what])
                problems.append(f"{file}:{where}: keys.{i}.{what}: is the same as in line {earlier}")
    declarations.refuse(problems)
    keys = [Key(each.name, bytes.fromhex(each.sha256),
                None if each.models == EVERYTHING else frozenset(each.models or ()), each.metrics) for each in entries]
    return {key.digest: key for key in keys}


class Keys:
    """The keys that are valid now.

    If the file is invalid, its last valid content stays in force. If it was never valid, no key of it is: the server
    is closed to all but the holder of the single key. If the file is gone, so are its keys, but the server does not
    open: that needs a restart.

    Args:
        file: it need not exist.
        single: the one key for everything ($VLLM_API_KEY), which is valid beside the file.
    """

    def __init__(self, file: Path, single: str | None) -> None:
        self._file = file
        self._single = Key(SINGLE, hashlib.sha256(single.encode()).digest(), metrics=True) if single else None
        self._by_digest: dict[bytes, Key] = {}
        self._followed = False  # whether there ever was a file
        self._last: bytes | str | None = None  # its content, or why it could not be read; None: there is no file
        self._secret = secrets.token_bytes(32)  # of this process, for `salt`
        self._task: asyncio.Task[None] | None = None
        self.metrics_need_key = False
        self.problem: str | None = None  # why no key of the file is valid, if it never was
        self.read()
        if not self._followed and self._single is None:
            log.warning("no keys: everybody who can reach this server may use every model (docs/keys.md)")

    @property
    def required(self) -> bool:
        """Whether clients need a key."""
        return self._followed or self._single is not None

    @property
    def locked(self) -> bool:
        """Whether nobody at all has a valid key, because the file was never valid."""
        return self.problem is not None and self._single is None

    def find(self, token: bytes) -> Key | None:
        """The key that a client sent; None if it is not valid."""
        if not token:
            return None
        digest = hashlib.sha256(token).digest()
        # The time of this comparison, and of the lookup, depends on the digest only. Nobody can choose a token by its
        # digest, so the time tells nothing about the digests of valid keys.
        if self._single and hmac.compare_digest(digest, self._single.digest):
            return self._single
        return self._by_digest.get(digest)

    @property
    def separate(self) -> bool:
        """Whether keys must not share vLLM's prefix cache. Without a file, all clients have the same rights."""
        return self._followed

    def salt(self, key: Key, own: str) -> str:
        """The salt of vLLM's prefix cache for a request, so that no key can learn from the time of a reply what was
        asked with another.

        Args:
            own: the client's own salt, which separates requests of one key from each other; empty for none.
        """
        # By the hash of the key and not by its name, which another team may get later.
        return hmac.digest(self._secret, key.digest + own.encode("utf-8", "surrogatepass"), "sha256").hex()

    def start(self) -> None:
        """Follow the file from now on."""
        self._task = asyncio.get_running_loop().create_task(self._forever())

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _forever(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await asyncio.to_thread(self.read)
            except Exception:  # the keys that are valid stay valid
                log.exception("cannot look for changed keys; trying again")

    def read(self) -> None:
        """Read the file if it changed. By its content: that is small, and times of files may be equal."""
        content: bytes | str | None
        try:
            content = read_plain_file(self._file, CONFIG_MAP_BYTES, follow_links=True)
        except (FileNotFoundError, NotADirectoryError):
            content = None
        except (OSError, UserError) as error:
            content = str(error)
        if content == self._last:
            return
        self._last = content
        if content is None:
            self._by_digest, self.problem = {}, None
            log.warning("%s is gone, and its keys are not valid any more", self._file)
            return
        before, self._followed = self._followed, True
        try:
            keys = load(self._file)
        except UserError as error:
            from serving import events  # not for the command line, which has no metrics

            if not before or self.problem:
                self.problem, self.metrics_need_key = str(error), True
            events.keys_refused(str(error), "no key of it is valid" if self.problem else
                                "its last valid keys stay valid")
            return
        self._by_digest, self.problem = keys, None
        self.metrics_need_key = any(key.metrics for key in keys.values())
        log.info("%d keys: %s", len(keys), ", ".join(sorted(key.name for key in keys.values())) or "none")


# The command line


def new(name: str, models: str) -> str:
    """A new key and what to do with it, as text for people."""
    named: str | list[str] = models if models == EVERYTHING else [each.strip() for each in models.split(",")]
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    digest = hashlib.sha256(key.encode()).hexdigest()
    try:
        Entry(name=name, sha256=digest, models=named)  # type: ignore[arg-type]
    except ValueError as error:
        problems = error.errors() if hasattr(error, "errors") else []
        raise UserError("\n".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}" for e in problems) or str(error)) \
            from None
    return (f"The key, which is not stored anywhere and not shown again. Give it to its team:\n\n{key}\n\n"
            f"Its entry in keys.yaml, below `keys:`:\n\n- name: {json.dumps(name)}\n  sha256: \"{digest}\"\n"
            f"  models: {json.dumps(named)}\n\n"
            "Then check the file and update the Secret. A running server follows without a restart:\n\n"
            "python -m serving.keys check keys.yaml\n"
            "kubectl -n NS create secret generic serving-keys --from-file=keys.yaml --dry-run=client -o yaml | "
            "kubectl apply -f -")


def check(file: Path) -> str:
    """What a valid file says, as text for people. Raises `UserError` otherwise."""
    lines = [f"{key.name}: " + ", ".join([*(["every model"] if key.models is None else sorted(key.models)),
                                          *(["/metrics"] if key.metrics else [])]) for key in load(file).values()]
    return "\n".join(lines) or "no keys: only the holder of VLLM_API_KEY gets in"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m serving.keys", allow_abbrev=False,
                                  description="Make keys for clients, and check the file of keys (docs/keys.md).")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    make = commands.add_parser("new", help="make a key and its entry in keys.yaml", allow_abbrev=False)
    make.add_argument("name", metavar="NAME", help="of the key, for people and metrics, such as team-a")
    make.add_argument("--models", required=True, metavar="A,B", help="the aliases that it may use, and the base "
                      "model's name if it may use that; '*' for all")
    validate = commands.add_parser("check", help="validate a file of keys and list who may use what",
                                   allow_abbrev=False)
    validate.add_argument("file", type=Path, metavar="FILE", help="keys.yaml")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_command(lambda: print(new(args.name, args.models) if args.command == "new" else check(args.file)))


if __name__ == "__main__":
    sys.exit(main())
