"""What a stage raises, and the exit code that Kubernetes sees for it (base/ maps 2 to an immediate failure)."""


class UserError(Exception):
    """Somebody must change something: the pipeline file, the data, a pin. Retrying cannot help. Exit code 2."""

    exit_code = 2


class RetryableError(Exception):
    """The world was not ready: a server down, an input late. A later attempt may succeed. Exit code 1."""

    exit_code = 1


class Terminated(Exception):
    """SIGTERM arrived and the work done so far is saved; the next pod resumes. Exit code 143 (128 + SIGTERM)."""

    exit_code = 143
