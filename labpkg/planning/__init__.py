"""Layer 0, standard library only: shapes and costs, answered in milliseconds."""
