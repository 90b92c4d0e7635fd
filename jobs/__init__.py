"""The job entrypoints: relocate, train, evaluate, and the tools around them (`python -m jobs --help`)."""
