"""How fast formax is, beside PyTorch, `torch.compile` and the Flax classes of transformers 4, measured in one run.

`python -m benchmarks` runs every topic, `python -m benchmarks.forward` one; docs/benchmarks.md says what is measured
and how to read it.
"""
