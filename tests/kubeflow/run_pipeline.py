"""Runs kubeflow/pipeline.py in .venv-kubeflow, once for each list of arguments in a JSON list; writes what each did."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from jobs.core.command import run_command  # noqa: E402
from kubeflow import pipeline  # noqa: E402


def run(arguments: list[str]) -> dict[str, Any]:
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = run_command(lambda: pipeline.run(pipeline.parser().parse_args(arguments)))
        except SystemExit as done:  # of argparse
            code = int(done.code or 0)
    return {"code": code, "output": output.getvalue(), "errors": errors.getvalue()}


if __name__ == "__main__":
    json.dump([run(arguments) for arguments in json.load(sys.stdin)], sys.stdout)
