"""Benchmarks. Run them from the repository root; fastppt_kernels need not be installed."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

if importlib.util.find_spec("fastppt_kernels") is None:
    sys.path.insert(0, str(ROOT / "kernels"))
