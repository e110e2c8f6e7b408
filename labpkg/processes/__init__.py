"""Layer 1: processes, meshes and the collectives between them."""
