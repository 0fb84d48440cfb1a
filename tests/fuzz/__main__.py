"""Fuzz a reader, guided by which of its lines an input reaches: `python -m tests.fuzz csv --seconds 600`.

Needs `pip install -e '.[fuzz]'`. It ends at the first finding: an exception other than InputError, a warning, or an
input that takes more than `--slowest` seconds (2) or 1 GiB. The input is then in tests/fuzz/kept/<target>, and ordinary
tests replay it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ppsim"]):
    import ppsim  # noqa: F401  (instrumented while it is imported)
    from tests.fuzz.targets import KEPT, TARGETS

from ppsim.errors import InputError


def main() -> None:
    """Fuzz until a finding, or the time is over."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--slowest", type=int, default=2, help="seconds of an input; more where other programs run")
    given = parser.parse_args()
    target = TARGETS[given.target]
    warnings.simplefilter("error")  # a warning on a terminal is a second message

    def try_one(data: bytes) -> None:
        try:
            target.read(data)
        except InputError:
            return

    kept = KEPT / given.target
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(target.seeds()):
            Path(folder, f"seed-{number}").write_bytes(seed)
            try_one(seed)  # and every module that it needs is imported
        options = {
            "max_total_time": given.seconds,
            "timeout": given.slowest,
            "rss_limit_mb": 2048,  # the interpreter, and 1 GiB
            "malloc_limit_mb": 1024,
            "artifact_prefix": f"{kept}/",
            "max_len": 4096,
            "print_final_stats": 1,
        }
        words = [sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), folder, str(kept)]
        atheris.Setup(words, try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
