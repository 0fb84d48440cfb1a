"""Explain: where a step's time went, and why two steps of one program took differently long."""
