"""Events of the aliases for operators: each is one line in the log, with fields, and one metric on /metrics.

A line is a sentence for people, followed by fields for log search:

    23:59:07 seville-hotels: serving 81e9dc13a516d878 event=swap alias=seville-hotels adapter=81e9dc13a516d878 …

The metrics are in prometheus_client's default registry, which vLLM's own /metrics shows.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress

from prometheus_client import Counter, Gauge, Histogram, Summary

log = logging.getLogger("serving")

ADAPTER = Gauge("serving_adapter_info", "1 for the adapter that is served under the alias, by digest.",
                ["alias", "digest"])
PROMOTIONS = Counter("serving_promotions_seen_total", "Promotions that this server noticed.", ["alias"])
SWAPS = Counter("serving_swaps_total", "Swaps of the alias to another adapter.", ["alias"])
REFUSALS = Counter("serving_refusals_total", "Adapters, evaluations, promotions and pipeline files that were refused.",
                   ["alias", "reason"])
# The aim is 2 s, of which 0.5 s are the poll interval. A large adapter takes as long as reading it takes.
LIVE = Histogram("serving_promotion_to_live_seconds",
                 "From the promotion, or the pipeline file's change if that came later, to the first request served.",
                 ["alias"], buckets=(0.25, 0.5, 1, 2, 5, 10, 30, 60, 300))
BY_KEY = ["key", "alias", "digest"]  # the key's name; the alias, or the base model's name
REQUESTS = Counter("serving_requests_total", "Requests that were passed on to vLLM.", BY_KEY)
PROMPT_TOKENS = Counter("serving_prompt_tokens_total", "Tokens of prompts.", BY_KEY)
COMPLETION_TOKENS = Counter("serving_completion_tokens_total", "Tokens of replies.", BY_KEY)
# Of each of the three above. Versions and keys come and go: beyond that, those that were used last stay.
USAGE_SERIES = 10_000
KEYS_REFUSED = Counter("serving_keys_refusals_total", "Invalid contents of the file of keys.")
DRAINING = Gauge("serving_draining", "1 while the server drains.")
STATE = Gauge("serving_alias_state", "1 for the state of the alias: current (the desired adapter is served), previous "
              "(another one of its adapters is), waiting or refused (none is).", ["alias", "state"])
RESIDENCY = Gauge("serving_adapter_residency", "1 for where a loaded adapter is: slot, memory or disk.",
                  ["alias", "digest", "place"])
LOOK = Summary("serving_look_seconds", "How long the server takes to look for changes, twice a second.")
HELD = Gauge("serving_requests_held", "Requests that wait for a LoRA slot.")
SLOT_WAIT = Histogram("serving_slot_wait_seconds", "How long a request waited for a LoRA slot, if it had to wait.",
                      buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60))
SWITCHES = Counter("serving_slot_switches_total", "Adapters that got a LoRA slot, by where they were before.",
                   ["source"])
STATES, PLACES = ("current", "previous", "waiting", "refused"), ("slot", "memory", "disk")

_used: dict[tuple[str, str, str], None] = {}  # the labels of the metrics by key, least recently used first


class Fields(logging.Formatter):
    """The message and then the record's `fields` as key=value; values with spaces or quotes as JSON strings."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        message = "; ".join(super().format(record).splitlines()) if fields else super().format(record)
        return " ".join([message, *(f"{key}={_value(value)}" for key, value in fields.items())])


def _value(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and not set(text) & set(' "=\\')
    return text if plain and text else json.dumps(text)


def log_to_stderr() -> None:
    """Give our loggers their own handler: a library that vLLM imports sets the root logger to ERROR."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Fields())
    for name in ("jobs", "serving"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


def promotion_seen(alias: str, adapter: str, evaluation: str) -> None:
    PROMOTIONS.labels(alias).inc()
    _log(logging.INFO, f"{alias}: promotion of {adapter} seen", "promotion", alias=alias, adapter=adapter,
         evaluation=evaluation)


def swapped(alias: str, adapter: str, before: str | None, by: str, seconds: float | None) -> None:
    """The alias switched, `seconds` after the promotion; None if the promotion is older than this server."""
    if before:
        ADAPTER.remove(alias, before)
    ADAPTER.labels(alias, adapter).set(1)
    SWAPS.labels(alias).inc()
    timed = {}
    if seconds is not None:
        LIVE.labels(alias).observe(seconds)
        timed = {"seconds": f"{seconds:.2f}"}
    _log(logging.INFO, f"{alias}: serving {adapter}", "swap", alias=alias, adapter=adapter, before=before or "none",
         by=by, **timed)


def refused(alias: str, what: str, reason: str, message: str) -> None:
    REFUSALS.labels(alias, reason).inc()
    # `not promoted` is normal while the evaluation runs.
    level = logging.WARNING if reason == "not promoted" else logging.ERROR
    _log(level, f"{what} refused ({reason}): {message}", "refusal", alias=alias, reason=reason)


def waiting(alias: str, adapter: str | None, why: str) -> None:
    """The desired adapter is not served; `adapter` is served instead, if not None."""
    serving = f"still serving {adapter}" if adapter else "not served"
    _log(logging.WARNING, f"{alias}: {serving}: {why}", "waiting", alias=alias, adapter=adapter or "none")


def unloaded(alias: str, adapter: str) -> None:
    _log(logging.INFO, f"{alias}: {adapter} finished its last request and is unloaded", "unload", alias=alias,
         adapter=adapter)


def removed(alias: str, adapter: str | None) -> None:
    """No pipeline file names the alias any more."""
    if adapter:
        ADAPTER.remove(alias, adapter)
    state(alias, None)
    _log(logging.INFO, f"{alias}: no pipeline file names it any more", "removal", alias=alias,
         adapter=adapter or "none")


def requested(key: str, alias: str, digest: str) -> None:
    """A request is passed on to vLLM."""
    labels, metrics = (key, alias, digest), (REQUESTS, PROMPT_TOKENS, COMPLETION_TOKENS)
    if labels not in _used:
        for metric in metrics:
            metric.labels(*labels)  # from 0 on: the first increase must show
    _used[labels] = _used.pop(labels, None)  # to the end
    if len(_used) > USAGE_SERIES:
        oldest = next(iter(_used))
        del _used[oldest]
        for metric in metrics:
            metric.remove(*oldest)
    REQUESTS.labels(*labels).inc()


def used(key: str, alias: str, digest: str, *, prompt: int, completion: int) -> None:
    """A request ended after so many tokens."""
    if (key, alias, digest) in _used:
        PROMPT_TOKENS.labels(key, alias, digest).inc(prompt)
        COMPLETION_TOKENS.labels(key, alias, digest).inc(completion)


def keys_refused(message: str, consequence: str) -> None:
    """The file of keys is invalid."""
    KEYS_REFUSED.inc()
    _log(logging.ERROR, f"keys refused: {message}; {consequence}", "keys_refusal")


def state(alias: str, now: str | None) -> None:
    """The alias is in one of `STATES`; None: it was removed."""
    _set_one(STATE, (alias,), STATES, now)


def resident(alias: str, adapter: str, place: str | None) -> None:
    """A loaded adapter is in one of `PLACES`; None: it is not loaded any more."""
    _set_one(RESIDENCY, (alias, adapter), PLACES, place)


def _set_one(gauge: Gauge, labels: tuple[str, ...], values: tuple[str, ...], now: str | None) -> None:
    """Set a gauge to 1 for one of the last label's values, and remove the others."""
    for value in values:
        if value == now:
            gauge.labels(*labels, value).set(1)
        else:
            with suppress(KeyError):  # it was never set
                gauge.remove(*labels, value)


def draining(reason: str) -> None:
    DRAINING.set(1)
    _log(logging.INFO, f"draining: {reason}", "drain", reason=reason)


def _log(level: int, message: str, event: str, **fields: object) -> None:
    log.log(level, "%s", message, extra={"fields": {"event": event, **fields}})
