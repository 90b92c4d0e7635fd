"""The embedded models: a tokenizer, a tiny base and a larger reference, made on the spot where no hub answers."""

from jobs.relocation.embedded.grammar import acceptability_pairs
from jobs.relocation.embedded.models import ARCHITECTURE, NAMES, write_model, write_tokenizer

__all__ = ["ARCHITECTURE", "NAMES", "acceptability_pairs", "write_model", "write_tokenizer"]
