"""Another address: validated, written everywhere, and nothing else changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from utils.address import AddressError, badge, parse_address, read_address, rewrite
from utils.publish import code_hash, list_notebooks
from utils.run import REPO

OTHER = "https://github.com/some-one/my.fork"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that may hold the address."""
    for name in ("notebooks", "utils"):
        ignored = shutil.ignore_patterns("__pycache__", "embedded", ".*")
        shutil.copytree(REPO / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPO / name, tmp_path / name)
    return tmp_path


def contents(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.suffix in (".ipynb", ".toml", ".md", ".py")]
    return {path.relative_to(root).as_posix(): path.read_bytes().decode() for path in files}


@pytest.mark.parametrize(
    "text",
    [
        "https://github.com/me/fork",
        "https://github.com/me/fork/",
        "https://github.com/me/fork.git",
        " https://github.com/me/fork.git/ ",
    ],
)
def test_an_address_has_one_form(text: str):
    assert parse_address(text) == "https://github.com/me/fork"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "me/fork",
        "http://github.com/me/fork",
        "https://gitlab.com/me/fork",
        "https://github.com/me",
        "https://github.com/me/fork/tree/main",
        "https://github.com/-me/fork",
        "https://github.com/me/fork?x=1",
        "https://github.com/me/a fork",
        "git@github.com:me/fork",
    ],
)
def test_other_addresses_are_refused(text: str):
    with pytest.raises(AddressError, match="expected https://github"):
        parse_address(text)


def test_the_address_is_replaced_and_nothing_else(copy: Path):
    before, old = contents(copy), read_address(copy)
    notebooks = [path.relative_to(copy).as_posix() for path in list_notebooks(copy)]
    assert set(rewrite(OTHER, copy)) >= {*notebooks, "pyproject.toml"}
    owner, name = old.split("/")[-2:]
    for path, text in contents(copy).items():
        back = text.replace(OTHER, old).replace("some-one/my.fork/blob", f"{owner}/{name}/blob")
        assert back == before[path], path
        if path in notebooks:
            assert text.count(f'ADDRESS = \\"{OTHER}\\"') == 1, path
            assert text.count(badge(OTHER, Path(path).name)) == 1, path
            assert f"{owner}/{name}" not in text, path
    assert read_address(copy) == OTHER


def test_the_hash_of_the_code_stays(copy: Path):
    """So the published outputs are still those of the present code."""

    def hashes() -> list[str]:
        read = [nbformat.read(path, as_version=4) for path in list_notebooks(copy)]
        return [code_hash(notebook, copy / "utils") for notebook in read]

    before = hashes()
    rewrite(OTHER, copy)
    assert hashes() == before
    path = list_notebooks(copy)[0]
    path.write_text(path.read_text().replace('PROFILE = \\"quick\\"', 'PROFILE = \\"cpu\\"'))
    assert hashes()[0] != before[0], "a cell that shapes the results must count"


def test_there_and_back_is_the_same(copy: Path):
    before, old = contents(copy), read_address(copy)
    rewrite(OTHER, copy)
    assert rewrite(OTHER, copy) == [], "the second time there is nothing to do"
    rewrite(old, copy)
    assert contents(copy) == before


def test_an_interrupted_call_can_be_repeated(copy: Path, monkeypatch: pytest.MonkeyPatch):
    third = list_notebooks(copy)[2]
    write = Path.write_text

    def interrupted(path: Path, *args: object, **keywords: object) -> int:
        if path == third:
            raise KeyboardInterrupt
        return write(path, *args, **keywords)

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rewrite(OTHER, copy)
    monkeypatch.undo()
    rewrite(OTHER, copy)
    old = "/".join(read_address().split("/")[-2:])
    assert not [name for name, text in contents(copy).items() if f"{old}/blob" in text]


def test_outputs_and_longer_names_are_left_alone(tmp_path: Path):
    old = "https://github.com/me/fork"
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text(f'[tool.report]\nrepository = "{old}"\n')
    longer = f"{old}2, {old}-x, {old}.js"
    (tmp_path / "README.md").write_text(f"See {old}. Clone {old}.git, not {longer}.")
    output = nbformat.v4.new_output("stream", text=old)
    cell = nbformat.v4.new_code_cell("1", outputs=[output])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebooks/01_a.ipynb")

    assert rewrite(OTHER, tmp_path) == ["README.md", "pyproject.toml"]
    text = (tmp_path / "README.md").read_text()
    assert text == f"See {OTHER}. Clone {OTHER}.git, not {longer}."


def test_the_command_runs_without_any_package(copy: Path):
    """From a clone, before anything is installed: -S hides all but the standard library."""
    command = [sys.executable, "-S", "-m", "utils.address"]
    done = subprocess.run([*command, f"{OTHER}.git"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{OTHER}: ")
    assert "notebooks/06_compare.ipynb" in done.stdout
    assert read_address(copy) == OTHER
    wrong = subprocess.run(
        [*command, "fork"], cwd=copy, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "'fork' is not the address" in wrong.stderr
    assert json.loads(list_notebooks(copy)[0].read_text())["nbformat"] == 4
