"""What a stage raises, and the exit code that Kubernetes sees for it (base/ maps 2 to an immediate failure)."""


class UserError(Exception):
    """Somebody must change something: the pipeline file, the data, a pin. Retrying cannot help. Exit code 2."""

    exit_code = 2


class RetryableError(Exception):
    """The world was not ready: a server down, an input late. A later attempt may succeed. Exit code 1."""

    exit_code = 1


class Terminated(BaseException):
    """SIGTERM arrived; what is saved stays, and the next pod goes on from there. Exit code 143 (128 + SIGTERM).

    Not an Exception: code that turns a library's exceptions into a UserError must not turn a stop into a failure.
    """

    exit_code = 143
