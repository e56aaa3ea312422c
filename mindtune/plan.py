"""The memory plan of a training script as a command.

    python -m mindtune.plan --script PATH flags

PATH is a training script. The command prints what `python PATH flags --dry_run` prints.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Optional

from mindtune.cli import UserError, run_script


def main() -> Optional[int]:
    """Runs the script with --dry_run. Raises UserError if --script PATH is missing."""
    if len(sys.argv) < 3 or sys.argv[1] != "--script" or not Path(sys.argv[2]).is_file():
        raise UserError(
            "python -m mindtune.plan --script PATH flags: PATH must be a training script, flags are that script's."
        )
    sys.argv = [sys.argv[2], *sys.argv[3:], "--dry_run"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    run_script(main)
