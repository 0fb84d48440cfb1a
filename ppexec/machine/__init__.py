"""Machine: the processes' clock and mesh, what else the computer is doing, and what the environment is."""
