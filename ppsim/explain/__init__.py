"""Explain: where a step's time went, and why two steps of one program took differently long."""

from ppsim.explain.attribution import PARTS, Attribution, attribute, critical_path
from ppsim.explain.comparison import Comparison, compare
from ppsim.explain.contribution import Contribution
from ppsim.explain.critical_path import CriticalPath, Segment

__all__ = [
    "PARTS",
    "Attribution",
    "Comparison",
    "Contribution",
    "CriticalPath",
    "Segment",
    "attribute",
    "compare",
    "critical_path",
]
