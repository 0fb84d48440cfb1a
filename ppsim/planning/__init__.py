"""Planning: the time and memory of training steps from shapes and a machine, and which way to run one is best."""
