"""Commands for people at a laptop: pin, check, local and kind."""
