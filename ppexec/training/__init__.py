"""Train: steps of an optimizer through the pipeline, with checkpoints that any other mesh can resume."""
