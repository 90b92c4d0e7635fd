"""The layout of a published adapter, in a registry or a bucket; jobs/publication writes it, relocation reads it.

    artifact.json, adapter_config.json, adapter_model.safetensors, README.md, …   the adapter's artifact
    evaluation/artifact.json, evaluation/evaluation.json, …                       the evaluation's artifact
    provenance.json                                                               what made both

In a registry each file is a layer of one manifest, in the format of ModelPack, the CNCF's specification for models. In
a bucket the files are objects below one prefix, and SHA256SUMS lists them.
"""

from __future__ import annotations

EVALUATION = "evaluation"  # the folder
PROVENANCE = "provenance.json"
SUMS = "SHA256SUMS"
# In an evaluation's manifest, under `about`: the names of its files that are not published: they hold private texts.
LEFT_OUT = "left_out"
# The folder in an evaluation that has its report without questions and answers.
WITHOUT_ANSWERS = "without-answers"
