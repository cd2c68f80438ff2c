"""The families, one file each: configuration, spec, forward pass, heads, table of architectures."""
