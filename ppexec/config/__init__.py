"""Configuration: what is run and how, checked before anything starts."""
