"""ppsim: predict a pipeline schedule's step time, bubble and activation memory from layer costs."""

from ppsim.advice.advise import Advice, advise
from ppsim.conditions import Conditions
from ppsim.costs.cost_file import load_costs, save_costs
from ppsim.costs.layout import Layout
from ppsim.costs.partition import partition, partition_sizes
from ppsim.costs.recompute import recompute_layers
from ppsim.costs.stage_cost import LayerCost, StageCost
from ppsim.errors import CostError, InputError, RunError, ScheduleError
from ppsim.estimate.block import Experts, LatentAttention
from ppsim.estimate.device import Device, device_names, named_device
from ppsim.estimate.estimate import estimate_costs
from ppsim.estimate.huggingface import read_huggingface_config
from ppsim.estimate.layer_work import transformer_work
from ppsim.estimate.machine import Machine
from ppsim.estimate.named_machines import machine_names, named_machine
from ppsim.estimate.transformer import Transformer
from ppsim.estimate.work import Execution
from ppsim.explain.attribution import Attribution, attribute, critical_path
from ppsim.explain.comparison import Comparison, compare
from ppsim.explain.path_and_slack import CriticalPath
from ppsim.network.all_reduce import Reduction
from ppsim.network.collectives import Collectives
from ppsim.network.host_link import HostLink
from ppsim.network.link import Link, LinkPiece
from ppsim.network.network import Network
from ppsim.notebook.compare_schedules import ScheduleComparison, compare_schedules
from ppsim.notebook.ways import hand_in as _hand_in
from ppsim.order_search.search import SearchResult, search
from ppsim.parameter_sweep.result import SweepResult, SweepRow, load_sweep
from ppsim.parameter_sweep.sweep import sweep
from ppsim.planning.candidates import Choices, Cluster
from ppsim.planning.machine_fit import MachineFit, fit_machine
from ppsim.planning.measured_steps import MeasuredStep, read_measured_steps
from ppsim.planning.planner import plan
from ppsim.planning.plans import Plan, Plans
from ppsim.planning.step_memory import StepMemory, step_memory
from ppsim.planning.step_table import StepSeconds, predict_steps
from ppsim.planning.training_step import TrainingStep
from ppsim.runs.read_run import read_run
from ppsim.runs.run import Run
from ppsim.runs.run_costs import RunCosts, costs_of
from ppsim.schedule.action import Action, Kind, OverlappedPair, parse_action
from ppsim.schedule.named.registry import build_schedule, schedule_names
from ppsim.schedule.offload import Offload
from ppsim.schedule.order import Order
from ppsim.schedule.posts import Posts
from ppsim.schedule.program import Program
from ppsim.schedule.schedule import Schedule
from ppsim.schedule.sharding import Sharding
from ppsim.simulation.replicas import simulate_replicas
from ppsim.simulation.simulate import simulate
from ppsim.trace.trace import Trace
from ppsim.variation.ensemble import Ensemble
from ppsim.variation.jitter import Jitter
from ppsim.variation.monte_carlo import monte_carlo

__version__ = "0.2.0"

__all__ = [
    "Action",
    "Advice",
    "Attribution",
    "Choices",
    "Cluster",
    "Collectives",
    "Comparison",
    "Conditions",
    "CostError",
    "CriticalPath",
    "Device",
    "Ensemble",
    "Execution",
    "Experts",
    "HostLink",
    "InputError",
    "Jitter",
    "Kind",
    "LatentAttention",
    "LayerCost",
    "Layout",
    "Link",
    "LinkPiece",
    "Machine",
    "MachineFit",
    "MeasuredStep",
    "Network",
    "Offload",
    "Order",
    "OverlappedPair",
    "Plan",
    "Plans",
    "Posts",
    "Program",
    "Reduction",
    "Run",
    "RunCosts",
    "RunError",
    "Schedule",
    "ScheduleComparison",
    "ScheduleError",
    "SearchResult",
    "Sharding",
    "StageCost",
    "StepMemory",
    "StepSeconds",
    "SweepResult",
    "SweepRow",
    "Trace",
    "TrainingStep",
    "Transformer",
    "advise",
    "attribute",
    "build_schedule",
    "compare",
    "compare_schedules",
    "costs_of",
    "critical_path",
    "device_names",
    "estimate_costs",
    "fit_machine",
    "load_costs",
    "load_sweep",
    "machine_names",
    "monte_carlo",
    "named_device",
    "named_machine",
    "parse_action",
    "partition",
    "partition_sizes",
    "plan",
    "predict_steps",
    "read_huggingface_config",
    "read_measured_steps",
    "read_run",
    "recompute_layers",
    "save_costs",
    "schedule_names",
    "search",
    "simulate",
    "simulate_replicas",
    "step_memory",
    "sweep",
    "transformer_work",
]

_hand_in()
