"""A form in the browser that prepares, starts and follows one training run.

    python -m mindtune.app --data photos --models models --outputs out

Open the address that it prints. Only this machine can reach it. The form reads from --data and --models, writes to
--outputs, and refuses other paths. Needs Gradio: pip install -e ".[app]", with Python 3.10 or newer. Ctrl-C ends the
form; a run that is going on saves a checkpoint first.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Optional

from mindtune.app.folders import Folders
from mindtune.app.run import Run
from mindtune.cli import UserError, run_script
from mindtune.doctor import training
from mindtune.files import require_writable
from mindtune.flags.parser import Parser, Values
from mindtune.flags.script_parser import raise_errors, script_parser


def parse_args(argv: Optional[list[str]] = None) -> Values:
    parser = Parser(__doc__)
    parser.prog = "python -m mindtune.app"
    parser.add("data", required=True, help="Directory with data sets, each in a directory of its own. Only read.")
    parser.add("models", required=True, help="Directory with base models, each in a directory of its own. Only read.")
    parser.add("outputs", required=True, help="Directory for everything that runs write, a directory for each run.")
    parser.add("port", type=int, default=7860, minimum=1, below=65536, help="Port of the form, on 127.0.0.1.")
    return parser.parse_args(argv)


def require_gradio() -> None:
    """Raises UserError if Gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        version = ".".join(map(str, sys.version_info[:2]))
        raise UserError(
            'Gradio is not installed, and the form needs it. Run `pip install -e ".[app]"` in the repository; this '
            f"needs Python 3.10 or newer (here: {version})."
        )


def find_folders(args: Values) -> Folders:
    """The folders that the flags name, as absolute paths. Raises UserError if one is missing."""
    for name in ("data", "models", "outputs"):
        if not Path(getattr(args, name)).is_dir():
            raise UserError(f"--{name} {getattr(args, name)}: is no directory. Create it, or name another one.")
    require_writable("--outputs", args.outputs)
    return Folders(Path(args.data).resolve(), Path(args.models).resolve(), Path(args.outputs).resolve())


def find_parsers() -> dict[str, tuple[Path, Parser]]:
    """(path, parser) of every training script of the repository, by its name. Raises UserError without a repository."""
    if not training.is_available():
        raise UserError(
            "the training scripts are not beside the package. Clone the repository, and install from there."
        )
    found = {}
    for name, script in training.SCRIPTS.items():
        path = training.REPOSITORY / script.path
        parser = script_parser(path)
        raise_errors(parser)
        found[name] = path, parser
    return found


def wait_for_end(run: Run) -> None:
    """Returns after Ctrl-C, SIGTERM or the end of the terminal, when the run, if there is one, has saved and ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A handler also means that processes started from here do not inherit that a shell ignores SIGINT.
        signal.signal(number, signal.default_int_handler)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass
    if run.process and run.is_running():
        run.stop()
        print("\nthe run saves a checkpoint and stops; press Ctrl-C again not to wait for it", flush=True)
        run.process.wait()
        print(run.status())


def main(argv: Optional[list[str]] = None) -> Optional[int]:
    args = parse_args(argv)
    require_gradio()
    folders = find_folders(args)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported: it would ask a server for news
    with tempfile.TemporaryDirectory() as shown:
        os.environ["GRADIO_TEMP_DIR"] = shown  # copies of the images that the browser shows
        from mindtune.app.page import build, launch

        run = Run()
        page = build(folders, run, find_parsers())
        print(f"open {launch(page, args.port)} in a browser on this machine; Ctrl-C ends the form", flush=True)
        wait_for_end(run)
        page.close(verbose=False)
    return 0


if __name__ == "__main__":
    run_script(main)
