"""Notebook: values as figures and as HTML where a notebook shows them."""
