"""Support: what tests share; examples drawn by hypothesis, models by name, and ways to call what is tested."""
