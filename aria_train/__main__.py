"""`python -m aria_train` is `aria-train`."""

import sys

from aria_train.cli import main

sys.exit(main())
