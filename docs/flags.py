"""Writes the tables of flags in the scripts' pages from their parsers.

python docs/flags.py            between <!-- flags of SCRIPT --> and <!-- end -->
"""

import re
import sys
from pathlib import Path

from mindtune.flags.script_parser import script_parser

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- flags of (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(script):
    """Markdown: every section with its flags, defaults, whether a resumed run may change them, and their meaning."""
    parser = script_parser(ROOT / script)
    rows = ["| flag | default | on resume | |", "| --- | --- | --- | --- |"]
    for section in parser._action_groups:
        actions = [action for action in section._group_actions if action.dest != "help"]
        if actions:
            rows.append(f"| **{section.title}** | | | |")
        rows += [row(action, parser.declared[action.dest]) for action in actions]
    return "\n".join(rows) + "\n"


def row(action, flag):
    """One line of the table from argparse's action and the rest of the declaration."""
    empty = action.default is None or action.default is False or action.default == []
    default = "required" if action.required else "" if empty else f"`{action.default}`"
    text = action.help % {"default": action.default}
    if action.choices:
        text += f" One of {', '.join(map(str, action.choices))}."
    bounds = (("at least", flag.minimum), ("above", flag.above), ("below", flag.below))
    if limits := " and ".join(f"{words} {value}" for words, value in bounds if value is not None):
        text += f" {limits[0].upper()}{limits[1:]}."
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    text = text.replace("|", "\\|").replace("<", "\\<")
    return f"| {names} | {default} | {'may change' if flag.may_change else 'fixed'} | {text} |"


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
