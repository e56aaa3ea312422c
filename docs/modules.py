"""Writes the tables of modules in docs/design.md from the first sentences of the modules' docstrings.

python docs/modules.py          between <!-- modules of ROOM --> and <!-- end -->; ROOM is mindtune or a folder in it
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "design.md"
MARKED = re.compile(r"(<!-- modules of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def modules(room: str) -> list[Path]:
    """The modules of mindtune/ itself (room "mindtune") or of one folder in it."""
    folder = ROOT / "mindtune" if room == "mindtune" else ROOT / "mindtune" / room
    return sorted(path for path in folder.glob("*.py") if path.stem != "__init__")


def rooms() -> list[str]:
    """The names of all rooms: "mindtune" and the folders in it that hold modules."""
    return ["mindtune", *sorted(path.parent.name for path in (ROOT / "mindtune").glob("*/__init__.py"))]


def purpose(module: Path) -> str:
    """The first sentence of a module's docstring, for a table cell. Raises ValueError if there is no docstring."""
    text = ast.get_docstring(ast.parse(module.read_text()))
    if not text:
        raise ValueError(f"{module.relative_to(ROOT)}: has no docstring; docs/design.md takes its first sentence")
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0].replace("|", "\\|")


def table(room: str) -> str:
    """Markdown: module and purpose."""
    rows = [f"| `{module.stem}` | {purpose(module)} |\n" for module in modules(room)]
    return "".join(["| module | purpose |\n", "| --- | --- |\n", *rows])


def filled(page: str) -> str:
    """The page with its tables as the docstrings have them."""
    return MARKED.sub(lambda found: found[1] + table(found[2]) + found[3], page)


def main() -> int:
    page = PAGE.read_text()
    if filled(page) != page:
        PAGE.write_text(filled(page))
        print("written: docs/design.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
