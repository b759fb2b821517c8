"""The training loop and what it stands on. Knows nothing of the models it trains."""
