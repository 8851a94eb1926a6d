"""The neural network (the method): attention, the KV cache, and frames in time."""
