"""Commands as a user types them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MLVICX = [sys.executable, "-m", "mlvicx_dist"]


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)
