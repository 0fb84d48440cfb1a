"""Calibration: what running costs beside computing, learnt from known schedules run beside what is to be predicted."""
