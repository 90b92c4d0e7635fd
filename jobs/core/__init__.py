"""What every room shares: the pipeline file, the plan, artifacts, promotion, errors, and what vLLM can serve."""
