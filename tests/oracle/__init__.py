"""The reference and its goldens: the generator, and what it shares with the test suite (`weights`, `compare`)."""
