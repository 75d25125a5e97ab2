"""`python -m mlvicx_dist` is `mlvicx`."""

import sys

from mlvicx_dist.cli import main

sys.exit(main())
