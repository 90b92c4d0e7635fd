"""What a stage raises, and the exit code that Kubernetes sees for it (base/ maps 2 to an immediate failure)."""

from __future__ import annotations

import errno
import os


class UserError(Exception):
    """A user must change something: the pipeline file, the data, a pin. A retry cannot help. Exit code 2."""

    exit_code = 2


class RetryableError(Exception):
    """A temporary failure: a server is down, an input is late. A later attempt may succeed. Exit code 1."""

    exit_code = 1


class Terminated(BaseException):
    """SIGTERM arrived; saved work stays, and the next pod resumes from it. Exit code 143 (128 + SIGTERM).

    Not an Exception: code that turns a library's exceptions into a UserError must not turn a stop into a failure.
    """

    exit_code = 143


def of_volume(error: OSError) -> UserError | RetryableError | None:
    """The error of a full, read-only or failing volume as advice for an operator; None for any other error."""
    name = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk is full while writing {name}: enlarge the volume, or lower `retention.keep` in "
                         "environment.yaml. Nothing was published")
    if error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{name}: {error.strerror} for user {os.getuid()}. Is the volume mounted read-only, or owned "
                         "by another user (fsGroup)?")
    if error.filename and error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return UserError(f"{name}: {error.strerror}: another kind of file is where a stage has its own. Move it away")
    if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
        return RetryableError(f"{name}: {error.strerror}: its volume fails or is gone; look at node and storage")
    return None
