"""Generation: the noise process, samplers, contexts of finished frames, and the loop over chunks."""
