"""Layer 3: whole training runs, their checkpoints and their faults."""
