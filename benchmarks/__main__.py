"""`make gpu`: also `python -m tvkernels.benchmarks`, or from a checkout where nothing is installed
`python benchmarks`.
"""

import sys
from pathlib import Path

if __package__:
    again = [sys.executable, "-m", __package__]
else:
    folder = Path(__file__).resolve().parent
    again = [sys.executable, str(folder)]
    sys.path[0] = str(folder.parent)
    import tvkernels

    tvkernels.__path__.append(str(folder.parent))  # where tvkernels.benchmarks lies in a checkout

from tvkernels.benchmarks.ops.gpu import main

if __name__ == "__main__":
    sys.exit(main(again=again))
