"""The publication job: bring a promoted adapter, with the evaluation that proved it, to a registry or a bucket.

    python -m jobs --pipeline overlays/staging/adapters/seville-hotels/pipeline.yaml --volumes /volumes publish

Waits for the evaluation's verdict. A rejected adapter is not published, which is a result, not a failure. What is
published already is not pushed again.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from jobs.core import artifacts, promotion, provenance, signing
from jobs.core.artifacts import MANIFEST
from jobs.core.errors import RetryableError, UserError
from jobs.core.pipeline import LoadedPipeline, Pipeline
from jobs.core.plan import FINE_TUNED_VOLUME, Plan, plan
from jobs.core.published import EVALUATION, PROVENANCE
from jobs.core.signing import Signer
from jobs.core.termination import write_termination_message
from jobs.publication import layout
from jobs.publication.layout import File
from jobs.publication.push import Published, push

log = logging.getLogger("jobs")

POLL_S = 2.0
EVALUATED = f"{EVALUATION}/{MANIFEST}"  # the evaluation's manifest, as it is published


def run(loaded: LoadedPipeline, volumes: Path, wait_seconds: float) -> None:
    """Publish the desired adapter, once it is promoted.

    Raises:
        UserError: environment.yaml does not say where to, a signature is missing, or access is denied.
        RetryableError: the evaluation or the promotion did not come in time, or the registry does not recover.
    """
    pipeline, wanted = loaded.pipeline, plan(loaded.pipeline)
    publication = pipeline.environment.publication
    if publication is None:
        raise UserError(f"{loaded.environment.path}: has no key `publication`, so there is no place to publish "
                        f"{pipeline.adapter} at. Add `publication: {{to: oci://REGISTRY/PREFIX}}`, or remove the Job "
                        "adapter-publication (docs/publication.md)")
    name = f"{pipeline.adapter}@{wanted.adapter.digest}"
    if loaded.changed:  # it will not be promoted, so there is nothing to wait for
        announce(f"NOT PUBLISHED: this run took other values than the pipeline file, so {name} is not promoted.")
        return
    signer = signing.signer(pipeline.environment)  # raises now, instead of after hours of waiting
    if not wait_for_promotion(pipeline.adapter, wanted, volumes, wait_seconds):
        announce(f"NOT PUBLISHED: {name} did not pass its evaluation. Only promoted adapters are published.")
        return
    keys = pipeline.environment.trusted_keys
    adapter, evaluation = (artifacts.read(spec.path(volumes), keys) for spec in (wanted.adapter, wanted.evaluation))
    files = layout.files(adapter, evaluation, answers=publication.answers,
                         sign=(lambda content: signer.sign(content).encode()) if signer else None)
    if signer:
        files = with_provenance(files, pipeline, signer)
    published = push(files, pipeline.adapter, wanted.adapter.digest, publication.to)
    announce(description(name, published))


def with_provenance(files: list[File], pipeline: Pipeline, signer: Signer) -> list[File]:
    """The files, and the signed statement of where the adapter comes from."""
    manifests = [next(file.content for file in files if file.path == path) for path in (MANIFEST, EVALUATED)]
    adapter, evaluation = (each if isinstance(each, bytes) else each.read_bytes() for each in manifests)
    statement = provenance.sign(pipeline, adapter, evaluation, EVALUATED, signer)
    return sorted([*files, File.of(PROVENANCE, statement)], key=lambda file: file.path)


def description(name: str, published: Published) -> str:
    """What was published, and the lines with which another environment imports it."""
    title = "PUBLISHED" if published.pushed else "ALREADY PUBLISHED"
    return "\n".join([f"{title}: {name}. In the pipeline.yaml of another environment:", *published.lines()])


def announce(message: str) -> None:
    """Report the result, in the log and as the pod's termination message."""
    log.info("%s", message)
    write_termination_message(message)


def wait_for_promotion(name: str, wanted: Plan, volumes: Path, wait_seconds: float) -> bool:
    """Wait until the adapter is promoted with this evaluation. Returns False if the evaluation rejected it.

    Raises:
        RetryableError: neither happened in time.
    """
    deadline = time.monotonic() + wait_seconds
    artifacts.wait_until_there([wanted.evaluation], volumes, wait_seconds)
    waiting = False
    while True:
        # Read each time: an evaluation that compared with another promoted adapter is made again in its place.
        if _passed(wanted.evaluation.path(volumes) / layout.EVALUATED) is False:
            return False
        promoted = promotion.current(volumes / FINE_TUNED_VOLUME, name)
        if promoted and (promoted.adapter, promoted.evaluation) == (wanted.adapter.digest, wanted.evaluation.digest):
            return True
        if time.monotonic() > deadline:
            raise RetryableError(f"{name}@{wanted.adapter.digest} passed its evaluation but was not promoted within "
                                 f"{wait_seconds:.0f} s. See the log of the evaluation's Job")
        if not waiting:
            log.info("waiting for the promotion of %s@%s", name, wanted.adapter.digest)
            waiting = True
        time.sleep(POLL_S)


def _passed(file: Path) -> bool | None:
    """The verdict; None while the evaluation is replaced."""
    try:
        return bool(json.loads(file.read_bytes())["passed"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: the verdict cannot be read ({error!r}). Move the evaluation away to have it made "
                        "again") from None
