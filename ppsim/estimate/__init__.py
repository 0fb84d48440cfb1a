"""Estimate: costs of a transformer's layers from shapes and a device's rates, without a run."""
