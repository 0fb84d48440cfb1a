"""Workers: the processes that are a run's ranks, and the loop that runs a rank's actions."""
