"""Network: what a message between two ranks takes, stated, fitted or read from a file; and adding up over replicas."""
