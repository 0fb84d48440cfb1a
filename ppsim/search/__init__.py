"""Search: the best order of F, B, I and W under an activation limit."""

from ppsim.search.search import SearchResult, search

__all__ = ["SearchResult", "search"]
