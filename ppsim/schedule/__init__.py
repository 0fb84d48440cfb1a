"""Schedule: every rank's order of actions as a value, proved to end, lowered to a program, read and written as CSV."""
