"""Machine code is kept while no kernel changes, and never answers for an edited one."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import ppsim
from ppsim.kernel_cache import hash_of_sources

ROOT = Path(ppsim.__file__).parent
CALLEE = "from demo.kernel_cache import kernel\n\n\n@kernel\ndef inner(x):\n    return x + {}\n"
CALLER = """from demo.callee import inner
from demo.kernel_cache import kernel


@kernel
def outer(x):
    return 10 * inner(x)


print(outer(1), sum(outer.stats.cache_hits.values()))
"""


def _run(folder: Path) -> list[int]:
    """What the caller answers, and how often it found machine code."""
    done = subprocess.run(
        [sys.executable, "-c", "import demo.caller"], cwd=folder, capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


def test_a_changed_callee_in_another_file_is_compiled_anew(tmp_path: Path) -> None:
    """Cause of a bug: the caller's own file is unchanged, so numba's cache alone would give the old answer."""
    package = tmp_path / "demo"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(ROOT / "kernel_cache.py", package)
    (package / "caller.py").write_text(CALLER)
    (package / "callee.py").write_text(CALLEE.format(1))
    assert _run(tmp_path) == [20, 0]
    assert _run(tmp_path) == [20, 1]
    (package / "callee.py").write_text(CALLEE.format(2))
    assert _run(tmp_path) == [30, 0]


def test_the_hash_is_of_files_with_kernels_alone(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("from ppsim.kernel_cache import kernel")
    (tmp_path / "other.py").write_text("")
    before = hash_of_sources(tmp_path)
    (tmp_path / "other.py").write_text("changed = True")
    assert hash_of_sources(tmp_path) == before
    (tmp_path / "kernels.py").write_text("from ppsim.kernel_cache import kernel  # changed")
    assert hash_of_sources(tmp_path) != before


def test_every_kernel_of_the_project_is_compiled_this_way() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if path.name != "kernel_cache.py":
                assert not any(name.split(".")[0] == "numba" for name in names), f"{path} imports numba itself"
