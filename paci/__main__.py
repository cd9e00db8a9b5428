"""``python -m paci``."""

import sys

from paci.cli import main

sys.exit(main())
