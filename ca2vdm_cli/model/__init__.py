"""The network: transformer, attention, KV cache and temporal window."""
