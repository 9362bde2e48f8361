"""`python -m mpq.cli`."""

import sys

from mpq.cli.main import main

sys.exit(main())
