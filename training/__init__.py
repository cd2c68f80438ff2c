"""Training: losses for the heads; optimiser, step and loop are optax's and the user's own for now."""
