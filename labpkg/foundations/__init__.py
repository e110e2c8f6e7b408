"""Layer 0, one process: losses, optimizers, models and data. Nothing communicates."""
