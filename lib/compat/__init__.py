"""The classes of transformers' other frameworks, on formax: `formax.compat.flax` and `formax.compat.tf`.

Whoever has code for them changes the import and goes on. New code has no need of these: a `formax.Model` is simpler.
"""
