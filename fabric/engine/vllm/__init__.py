"""An engine over a vLLM server, for models that it serves better than ours does."""
