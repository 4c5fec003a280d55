"""`python -m ldmcli …`, the form that launchers start."""

import sys

from ldmcli.cli import main

if __name__ == "__main__":
    sys.exit(main())
