"""Tests of kubeflow/. What imports kfp runs in .venv-kubeflow, as a process of its own."""
