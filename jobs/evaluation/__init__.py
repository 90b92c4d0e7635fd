"""Evaluation: the metrics, the gate that they are held against, and the report."""
