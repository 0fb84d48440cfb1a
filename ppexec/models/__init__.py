"""Models: a list of layers, where the microbatches come from, and the loss; everything random derived from one seed."""
