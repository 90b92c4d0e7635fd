"""Relocation: pinned sources, brought onto a volume and verified."""
