"""Publication: promoted adapters, brought to a registry or a bucket, and exported for people."""
