"""Training: the LoRA adapter, on one process or several, and the merged model."""
