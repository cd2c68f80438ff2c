"""Generation: its settings, what is done to scores before a token is chosen, and when it stops."""
