"""Layer 2: the engines. They communicate through `labpkg.processes.collectives`."""
