"""Files: a trace in the format that a file's name asks for."""

from __future__ import annotations

from pathlib import Path

from ppsim.files import write_text
from ppsim.trace.trace import Trace


def write_trace(trace: Trace, path: Path) -> None:
    """`.json` or `.json.gz` for ui.perfetto.dev, `.csv` as `Trace.to_frame` has it, any other name for `Trace.load`."""
    if path.name.endswith((".json", ".json.gz")):
        from ppsim.export.perfetto import save_perfetto

        save_perfetto({"predicted" if trace.clock == "simulated" else trace.clock: trace}, path)
    elif path.name.endswith(".csv"):
        write_text(path, trace.to_frame().to_csv(index=False))
    else:
        trace.save(path)
