"""Transports: how messages travel between ranks."""
