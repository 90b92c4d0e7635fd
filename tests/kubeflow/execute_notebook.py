"""Runs kubeflow/GeneratePipeline.ipynb from top to bottom in .venv-kubeflow, and writes it with its outputs."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

if __name__ == "__main__":
    notebook = nbformat.read(sys.argv[1], as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(Path(sys.argv[1]).parent)}}).execute()
    nbformat.write(notebook, sys.argv[2])
