"""Verify: gradients and outputs held against one process without a pipeline."""
