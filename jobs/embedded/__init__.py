"""The embedded models: a tokenizer, a tiny base and a larger reference, made on the spot where no hub answers."""

from .grammar import acceptability_pairs
from .models import ARCHITECTURE, NAMES, RECIPE, write_model, write_tokenizer

__all__ = ["ARCHITECTURE", "NAMES", "RECIPE", "acceptability_pairs", "write_model", "write_tokenizer"]
