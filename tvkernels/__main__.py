"""`python -m tvkernels` is `tvk`."""

import sys

from tvkernels.cli import main

sys.exit(main())
