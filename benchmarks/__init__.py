"""Measurements of real servers, run by hand: `make bench-serving`."""
