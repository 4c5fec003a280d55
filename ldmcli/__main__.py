"""`python -m ldmcli …`, the form that launchers start."""

import os
import sys

from ldmcli.cli import main


def run() -> None:
    """Ends the process with the command's code.

    One of several processes leaves without the interpreter's teardown: all files are closed and the ending is reported,
    and a thread of the process group that still lives then aborts now and then, which would make a lost process of a
    finished training.
    """
    try:
        code = int(main())
    except SystemExit as ending:
        code = int(ending.code or 0)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
