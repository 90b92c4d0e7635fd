"""vLLM as `python -m serving` starts it, but without the guard: the baseline of benchmarks.serving.

It takes the same arguments and does the same until vLLM starts, so that command line and environment stay those of the
guarded server. Then vLLM loads the adapter itself, under the name that clients use.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

ADAPTER = "UNGUARDED_ADAPTER"  # the environment variable with NAME=FOLDER


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
