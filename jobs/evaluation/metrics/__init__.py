"""The metrics, as `evaluate.Metric` classes that need no network and no writable home.

`evaluate.load("rouge")` downloads a script from the hub; these classes are the same interface without that.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import evaluate


def compute(metric: type[evaluate.Metric], **inputs: Any) -> dict[str, float]:
    """Compute one metric over columns of inputs (equally long lists, by the names in its docstring).

    `evaluate` makes a cache folder in the home directory, even for data kept in memory: a pod's home is read-only.
    """
    with TemporaryDirectory(prefix="metric-") as cache:
        result: dict[str, float] = metric(cache_dir=cache, keep_in_memory=True).compute(**inputs)
    return result
