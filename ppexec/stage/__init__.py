"""Stage: what one rank computes of a model, forward and backward, and what it keeps meanwhile."""
