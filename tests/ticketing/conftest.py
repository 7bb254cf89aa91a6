"""The example is an application, not an installed package: its folder is put where Python finds it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
