"""formax: every transformer family as pure JAX functions."""
