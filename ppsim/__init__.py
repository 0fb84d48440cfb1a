"""ppsim: predict a pipeline schedule's step time, bubble and activation memory from layer costs."""

from ppsim.action import Action, Kind, OverlappedPair, parse_action
from ppsim.costfile import load_costs, save_costs
from ppsim.costs import LayerCost, StageCost
from ppsim.device import Device, device_names, named_device
from ppsim.ensemble import Ensemble
from ppsim.errors import CostError, ScheduleError
from ppsim.estimate import estimate_costs
from ppsim.explain import Attribution, Comparison, CriticalPath, attribute, compare, critical_path
from ppsim.huggingface import read_huggingface_config
from ppsim.jitter import Jitter
from ppsim.layerwork import transformer_work
from ppsim.link import Link, LinkPiece
from ppsim.montecarlo import monte_carlo
from ppsim.network import Network
from ppsim.order import Order
from ppsim.partition import partition, partition_sizes
from ppsim.program import Program
from ppsim.recompute import recompute_layers
from ppsim.reduction import Reduction
from ppsim.schedule import Schedule
from ppsim.schedules import build_schedule, schedule_names
from ppsim.search import SearchResult, search
from ppsim.simulate import simulate
from ppsim.sweep import SweepResult, SweepRow, load_sweep, sweep
from ppsim.trace import Trace
from ppsim.transformer import Transformer
from ppsim.work import Execution

__version__ = "0.1.0"

__all__ = [
    "Action",
    "Attribution",
    "Comparison",
    "CostError",
    "CriticalPath",
    "Device",
    "Ensemble",
    "Execution",
    "Jitter",
    "Kind",
    "LayerCost",
    "Link",
    "LinkPiece",
    "Network",
    "Order",
    "OverlappedPair",
    "Program",
    "Reduction",
    "Schedule",
    "ScheduleError",
    "SearchResult",
    "StageCost",
    "SweepResult",
    "SweepRow",
    "Trace",
    "Transformer",
    "attribute",
    "build_schedule",
    "compare",
    "critical_path",
    "device_names",
    "estimate_costs",
    "load_costs",
    "load_sweep",
    "monte_carlo",
    "named_device",
    "parse_action",
    "partition",
    "partition_sizes",
    "read_huggingface_config",
    "recompute_layers",
    "save_costs",
    "schedule_names",
    "search",
    "simulate",
    "sweep",
    "transformer_work",
]
