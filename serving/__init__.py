"""Serving: starts vLLM's OpenAI server on what the pipeline files ask for, and guards it from inside."""
