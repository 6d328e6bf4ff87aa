"""`python -m prefbuild` is `prefbuild`."""

import sys

from prefbuild.cli import main

sys.exit(main())
