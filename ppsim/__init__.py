"""ppsim: predict a pipeline schedule's step time, bubble and activation memory from layer costs."""

from ppsim.action import Action, Kind, OverlappedPair, parse_action
from ppsim.costfile import load_costs, save_costs
from ppsim.costs import LayerCost, StageCost
from ppsim.errors import CostError, ScheduleError
from ppsim.link import Link, LinkPiece
from ppsim.network import Network
from ppsim.order import Order
from ppsim.partition import partition, partition_sizes
from ppsim.program import Program
from ppsim.schedule import Schedule
from ppsim.schedules import build_schedule, schedule_names
from ppsim.search import SearchResult, search
from ppsim.simulate import simulate
from ppsim.trace import Trace

__version__ = "0.1.0"

__all__ = [
    "Action",
    "CostError",
    "Kind",
    "LayerCost",
    "Link",
    "LinkPiece",
    "Network",
    "Order",
    "OverlappedPair",
    "Program",
    "Schedule",
    "ScheduleError",
    "SearchResult",
    "StageCost",
    "Trace",
    "build_schedule",
    "load_costs",
    "parse_action",
    "partition",
    "partition_sizes",
    "save_costs",
    "schedule_names",
    "search",
    "simulate",
]
