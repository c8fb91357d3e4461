"""What a build makes of kills, full disks, flipped bits and clocks set back: `python -m tests.faults`."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(folder) for folder in (TESTS, TESTS / "workflow") if str(folder) not in sys.path]
