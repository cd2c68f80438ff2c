"""What makes the inputs of any checkpoint: Auto classes, and the files they read."""
