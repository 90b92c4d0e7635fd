"""vLLM as `python -m serving` starts it, less the guard: the side that benchmarks.serving compares the guard with.

It takes the same arguments and does the same until vLLM starts, so that command line and environment cannot drift from
those of the guarded server; and then vLLM loads the adapter itself, under the name that clients say.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

ADAPTER = "UNGUARDED_ADAPTER"  # the environment variable that says NAME=FOLDER


def main() -> int:
    from serving import __main__ as serving

    run_module = runpy.run_module

    def without_guard(module: str, **options: Any) -> dict[str, Any]:
        at = sys.argv.index("--middleware")
        sys.argv[at:at + 2] = ["--lora-modules", os.environ[ADAPTER]]
        return run_module(module, **options)

    runpy.run_module = without_guard  # type: ignore[assignment]
    return serving.main()


if __name__ == "__main__":
    sys.exit(main())
