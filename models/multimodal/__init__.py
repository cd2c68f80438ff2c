"""Models of several kinds of input at once."""
