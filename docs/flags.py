"""Writes the tables of flags in the scripts' pages from their parsers.

python docs/flags.py            between <!-- flags of SCRIPT --> and <!-- end -->
"""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- flags of (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def parser_of(script):
    """The parser of a script, caught when it is asked to read a command line."""
    spec = importlib.util.spec_from_file_location("script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    caught, real = [], argparse.ArgumentParser.parse_args

    def note(parser, *_):
        caught.append(parser)
        raise SystemExit

    argparse.ArgumentParser.parse_args = note
    try:
        module.parse_args([])
    except SystemExit:
        return caught[0]
    finally:
        argparse.ArgumentParser.parse_args = real


def table(script):
    """Markdown: flag, default, what --help says."""
    rows = ["| flag | default | |", "| --- | --- | --- |"]
    for action in parser_of(script)._actions:
        if action.dest == "help":
            continue
        empty = action.default is None or action.default is False or action.default == []
        default = "required" if action.required else "" if empty else f"`{action.default}`"
        choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
        text = (action.help % {"default": action.default} + choices).replace("|", "\\|").replace("<", "\\<")
        rows.append(f"| {', '.join(f'`{name}`' for name in action.option_strings)} | {default} | {text} |")
    return "\n".join(rows) + "\n"


def filled(page):
    """The page's text with its tables as the parsers have them."""
    return MARKED.sub(lambda found: found[1] + table(found[2]) + found[3], page.read_text())


def main():
    for page in sorted((ROOT / "docs").glob("*.md")):
        if (text := filled(page)) != page.read_text():
            page.write_text(text)
            print(f"written: docs/{page.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
