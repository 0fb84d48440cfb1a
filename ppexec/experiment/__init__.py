"""Experiment: a prediction and a measurement of one configuration, made in turns, held against each other."""
