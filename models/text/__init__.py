"""Text families."""
