"""Pure functions on arrays and parameter dicts.

A layer is a pair: `*_spec` says what exists, its function what is computed. Axis letters everywhere: B batch, T query
length, S key length, H heads, K key-value heads, D head size, E embedding size, V vocabulary.
"""
