"""Evaluation: the metrics, the gate that checks them, and the report."""
