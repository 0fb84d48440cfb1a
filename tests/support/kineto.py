"""Chrome traces as torch.profiler writes them of PyTorch's pipeline runtime, made from a simulated step."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from ppsim import OverlappedPair, Trace
from ppsim.schedule.action import Action

HOST_S = 0.004  # what the host needs to launch an action's kernels


def write_kineto(
    steps: Sequence[Trace],
    path: Path,
    *,
    behind_s: Sequence[float],
    kernels: bool = False,
    compressed: bool = False,
    name: str = "trace_{rank}.json",
) -> None:
    """Write a folder.

    A range begins when the rank is free and ends with its computation, whose first operation begins when the input is
    there. With `kernels` ranges are of the launches alone, all at the step's start, and the times are the kernels'.
    """
    path.mkdir(parents=True, exist_ok=True)
    program = steps[0].program
    for rank in range(program.ranks):
        events: list[dict] = []
        for number, trace in enumerate(steps):
            begin_s = 100.0 * number
            free_s, launched_s = 0.0, 0.0
            for at in range(int(program.rank_actions[rank]), int(program.rank_actions[rank + 1])):
                rows = range(int(program.action_start[at]), int(program.action_start[at + 1]))
                parts = [program.action_of(row) for row in rows]
                action = parts[0] if len(parts) == 1 else OverlappedPair(*parts)
                start_s, end_s = float(trace.start_s[rows[0]]), float(trace.end_s[rows[-1]])
                if kernels:
                    events += _launched(action, begin_s + launched_s, begin_s + start_s, begin_s + end_s, len(events))
                    launched_s += HOST_S
                else:
                    events.append(_event(f"PP:{action}", "user_annotation", begin_s + free_s, begin_s + end_s))
                    events.append(_event("aten::linear", "cpu_op", begin_s + start_s, begin_s + end_s))
                for row in rows:
                    sent = int(program.message_out[row])
                    if sent >= 0:
                        left_s = begin_s + float(trace.message_start_s[sent])
                        send = str(program.message_action(sent, sending=True))
                        events.append(_event(f"PP:{send}", "user_annotation", left_s, left_s + 1e-5))
                free_s = end_s
            events.append(
                _event(f"PP:{program.schedule.stages_of(rank)[0]}REDUCE_GRAD", "user_annotation", begin_s, begin_s)
            )
        for event in events:
            event["ts"] -= 1e6 * behind_s[rank]
        document = {"distributedInfo": {"rank": rank}, "baseTimeNanoseconds": 10**18, "traceEvents": events}
        file = path / name.format(rank=rank)
        text = json.dumps(document).encode()
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(text)) if compressed else file.write_bytes(text)


def _event(name: str, category: str, start_s: float, end_s: float, **args: object) -> dict:
    return {"ph": "X", "name": name, "cat": category, "ts": 1e6 * start_s, "dur": 1e6 * (end_s - start_s), "args": args}


def _launched(action: Action | OverlappedPair, host_s: float, start_s: float, end_s: float, number: int) -> list[dict]:
    """A range on the host, its launches, and two kernels that share the action's time; NCCL's beside them."""
    middle_s = (start_s + end_s) / 2
    events = [_event(f"PP:{action}", "user_annotation", host_s, host_s + HOST_S)]
    events += [_event(f"PP:{action}", "gpu_user_annotation", start_s - 0.3, end_s + 0.3)]
    events += [_event("aten::linear", "cpu_op", host_s + 1e-4, host_s + 2e-4)]
    for at, (name, first_s, last_s) in enumerate(
        [("gemm", start_s, middle_s), ("gemm", middle_s, end_s), ("ncclDevKernel_SendRecv", start_s - 0.5, end_s + 0.5)]
    ):
        correlation = 10 * number + at
        events += [_event("cudaLaunchKernel", "cuda_runtime", host_s + 1e-4, host_s + 1.5e-4, correlation=correlation)]
        events += [_event(name, "kernel", first_s, last_s, correlation=correlation, stream=7 + at)]
    return events
