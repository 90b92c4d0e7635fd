from .grammar import acceptability_pairs
from .models import ARCHITECTURE, NAMES, RECIPE, write_tokenizer
