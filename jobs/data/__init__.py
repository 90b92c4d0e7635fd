"""Records: their formats, validation, the split into train and holdout, and their encoding to tokens."""
