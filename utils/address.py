"""The repository's public address: written once in pyproject.toml, copied from there.

    python -m utils.address https://github.com/me/fork

writes another address there and wherever it is used: the badge and the first code cell of each
notebook, and the README. Outputs and all other cells stay as they are.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
_GITHUB = re.compile(r"https://github\.com/[A-Za-z0-9](?:-?[A-Za-z0-9])*/[\w.-]*[\w-]")


class AddressError(ValueError):
    """An address that is not one of a repository on GitHub."""


def read_address(root: Path = HERE) -> str:
    """Return the address that pyproject.toml holds."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["tool"]["report"]["repository"]


def parse_address(text: str) -> str:
    """Return the address without `.git` and a slash at its end.

    Raises:
        AddressError: if it is not `https://github.com/OWNER/NAME`; Colab opens no others.
    """
    address = text.strip().removesuffix("/").removesuffix(".git")
    if not _GITHUB.fullmatch(address):
        raise AddressError(
            f"{text!r} is not the address of a repository on GitHub; expected "
            "https://github.com/OWNER/NAME, for example: make address URL=https://github.com/me/fork"
        )
    return address


def badge(address: str, name: str) -> str:
    """Return the Markdown of the badge that opens a notebook of the repository in Colab."""
    target = f"https://colab.research.google.com{_path(address)}/blob/main/notebooks/{name}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({target})"


def rewrite(address: str, root: Path = HERE) -> list[str]:
    """Replace the present address by another one and return the names of the changed files."""
    old, changed = read_address(root), []
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            source = cell["source"]
            if isinstance(source, str):
                cell["source"] = _replace(source, old, address)
            else:
                cell["source"] = [_replace(line, old, address) for line in source]
        # As nbformat writes it, so that nothing else of the file changes.
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        changed += _write(path, text, root)
    # pyproject.toml is last: until then an interrupted call can be repeated.
    for path in (root / "README.md", root / "pyproject.toml"):
        text = _replace(path.read_text(encoding="utf-8"), old, address)
        changed += _write(path, text, root)
    return changed


def _replace(text: str, old: str, new: str) -> str:
    """Replace the address and its part of a badge, but not the beginning of a longer name."""
    end = r"(?![\w-]|\.(?!git\b)\w)"
    text = re.sub(re.escape(old) + end, lambda _: new, text)
    before, after = f"colab.research.google.com{_path(old)}/", _path(new)
    return text.replace(before, f"colab.research.google.com{after}/")


def _path(address: str) -> str:
    return "/github/" + "/".join(address.split("/")[-2:])


def _write(path: Path, text: str, root: Path) -> list[str]:
    if text == path.read_text(encoding="utf-8"):
        return []
    path.write_text(text, encoding="utf-8", newline="\n")
    return [path.relative_to(root).as_posix()]


def _main(arguments: list[str]) -> int:
    try:
        changed = rewrite(parse_address(arguments[0] if arguments else ""))
    except AddressError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n  ".join([f"{read_address()}: {len(changed)} files changed", *changed]))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
