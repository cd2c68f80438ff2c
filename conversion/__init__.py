"""Checkpoint formats: reads and writes the files of other frameworks, knowing formats but no model family."""
