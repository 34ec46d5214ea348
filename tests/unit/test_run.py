"""The notebook runner, on tiny notebooks in a folder of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from utils.experiments.publish import LARGE, code_hash, copy_run, publish, save_notebook
from utils.experiments.run import REPO, main
from utils.files import read_jsonl, write_jsonl

FILES = ("run.json", "metrics.csv", "samples.jsonl")
TWO_PLUS_TWO = "print('[demo] step 1/2')\nprint('quiet')\n2 + 2"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty counts as unset; the runner sets the variable for its kernels, and this is undone."""
    monkeypatch.setenv("REPORT_PROFILE", "")


def write_notebook(root: Path, name: str, *sources: str) -> Path:
    path = root / "notebooks" / name
    path.parent.mkdir(exist_ok=True)
    cells = [new_markdown_cell("# A title\n\nProse.")] + [new_code_cell(s) for s in sources]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def executed(root: Path, name: str, folder: str = "notebooks") -> nbformat.NotebookNode:
    return nbformat.read(root / "runs" / "smoke" / folder / name, as_version=4)


def text_of(notebook: nbformat.NotebookNode) -> str:
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    return json.dumps(outputs)


def test_a_sequence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Order, environment, progress, cost, scrubbed paths; the notebooks are not changed."""
    first = write_notebook(
        tmp_path, "01_first.ipynb", "import os, pathlib\npathlib.Path('mark').write_text('1')"
    )
    second = write_notebook(
        tmp_path,
        "02_second.ipynb",
        "import os, pathlib\nprint(pathlib.Path('mark').read_text(), os.environ['REPORT_PROFILE'])",
        "print(pathlib.Path.cwd())\nprint(pathlib.Path.home() / 'thing')\n" + TWO_PLUS_TWO,
    )
    before = {path: path.read_bytes() for path in (first, second)}

    assert main(["--profile", "smoke"], root=tmp_path) == 0

    shown = capsys.readouterr().out
    assert shown.index("01_first (1 of 2)") < shown.index("02_second (2 of 2)")
    assert "cell 2/2  A title" in shown
    assert "[demo] step 1/2" in shown
    assert "quiet" not in shown
    assert {path: path.read_bytes() for path in before} == before

    notebook = executed(tmp_path, "02_second.ipynb")
    outputs = text_of(notebook)
    assert "1 smoke" in outputs
    assert str(tmp_path) not in outputs
    assert str(Path.home()) + "/" not in outputs
    assert "~/thing" in outputs
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2]
    assert notebook.metadata.report["profile"] == "smoke"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", notebook.metadata.report["executed"])
    assert not any("execution" in cell.metadata for cell in notebook.cells)

    cost = json.loads((tmp_path / "runs/smoke/cost.json").read_text())
    assert list(cost) == ["01_first", "02_second"]
    assert cost["01_first"]["seconds"] > 0
    assert 0.01 < cost["01_first"]["peak_rss_gb"] < 4


def test_a_failing_cell_stops_the_sequence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_notebook(tmp_path, "01_bad.ipynb", "print('before')", "raise ValueError('too small')")
    write_notebook(tmp_path, "02_never.ipynb", "1")

    assert main(["--profile", "smoke"], root=tmp_path) == 1

    shown = capsys.readouterr()
    assert "01_bad.ipynb, code cell 2 of 2" in shown.err
    assert "ValueError: too small" in shown.err
    assert "runs/smoke/failed/01_bad.ipynb" in shown.err
    assert "02_never" not in shown.out
    assert "before" in text_of(executed(tmp_path, "01_bad.ipynb", "failed"))
    assert not (tmp_path / "runs/smoke/notebooks/01_bad.ipynb").exists()


def test_an_interrupt_reaches_the_cell(tmp_path: Path):
    """The cell gets the chance to save its work, and the user is told how to go on."""
    write_notebook(
        tmp_path,
        "01_long.ipynb",
        "import os, signal, time\ntry:\n    os.kill(os.getppid(), signal.SIGINT)\n"
        "    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved')",
        "print('not reached')",
    )
    code = (
        "import sys, pathlib; from utils.experiments.run import main; "
        "sys.exit(main(['--profile', 'smoke'], root=pathlib.Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert "the same command continues" in done.stderr
    outputs = text_of(executed(tmp_path, "01_long.ipynb", "failed"))
    assert "saved" in outputs
    assert "not reached" not in outputs


def test_some_notebooks_and_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("01_a", "02_b", "03_c"):
        write_notebook(tmp_path, f"{name}.ipynb", "1")
    (tmp_path / "results" / "smoke").mkdir(parents=True)
    cost = {"02_b": {"seconds": 60, "peak_rss_gb": 9.0}, "03_c": {"seconds": 120}}
    (tmp_path / "results" / "smoke" / "cost.json").write_text(json.dumps(cost))
    assert main(["--profile", "smoke", "--only", "02", "03"], root=tmp_path) == 0
    shown = capsys.readouterr().out
    assert "02_b (1 of 2), 0.0 min used, at most 3.0 left" in shown
    assert "03_c (2 of 2)" in shown
    measured = json.loads((tmp_path / "runs/smoke/cost.json").read_text())
    assert list(measured) == ["02_b", "03_c"]
    assert measured["02_b"]["peak_rss_gb"] < 4, "what was published is no measurement"
    assert main(["--profile", "smoke", "--only", "07"], root=tmp_path) == 1
    assert "starts with 07: 01_a, 02_b, 03_c" in capsys.readouterr().err
    assert main(["--profile", "smok"], root=tmp_path) == 1
    assert "did you mean smoke" in capsys.readouterr().err


def own_profile(root: Path, **fields: object) -> Path:
    path = root / "own" / "mine.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"profile": "smoke", **fields}))
    return path


def test_a_profile_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Its runs carry the file's name; the kernels get the path, whatever the environment says."""
    monkeypatch.setenv("REPORT_PROFILE", "quick")
    path = own_profile(tmp_path, **{"reinforce.steps": 2})
    write_notebook(tmp_path, "01_a.ipynb", "import os\nprint(os.environ['REPORT_PROFILE'])")

    assert main(["--profile", str(path)], root=tmp_path) == 0

    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["mine"]
    notebook = nbformat.read(tmp_path / "runs/mine/notebooks/01_a.ipynb", as_version=4)
    assert "own/mine.json" in text_of(notebook)
    assert notebook.metadata.report["profile"] == "mine"
    assert set(json.loads((tmp_path / "runs/mine/cost.json").read_text())) == {"01_a"}
    assert "is in runs/mine" in capsys.readouterr().out


def test_a_bad_profile_starts_no_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = own_profile(tmp_path, **{"reinforce.step": 2})
    write_notebook(tmp_path, "01_a.ipynb", "1")
    assert main(["--profile", str(path)], root=tmp_path) == 1
    shown = capsys.readouterr()
    assert "did you mean reinforce.steps" in shown.err
    assert "Traceback" not in shown.err
    assert not shown.out
    path.write_text('{"profile": "smoke",}')
    assert main(["--profile", str(path)], root=tmp_path) == 1
    assert "mine.json cannot be read as a profile" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_profile_from_a_file_is_not_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Publishing would replace the committed outputs, so what is finished does not matter."""
    notebook = finished_sequence(tmp_path)
    (tmp_path / "runs" / "smoke").rename(tmp_path / "runs" / "mine")
    before = notebook.read_bytes()
    path = own_profile(tmp_path)
    assert main(["--profile", str(path), "--publish"], root=tmp_path) == 1
    assert "stays in runs/mine" in capsys.readouterr().err
    assert notebook.read_bytes() == before
    assert not (tmp_path / "results").exists()


def make_run(folder: Path, status: str, value: str) -> None:
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint" / "adapter.safetensors").write_text("large")
    (folder / "run.json").write_text(json.dumps({"status": status, "value": value}))
    (folder / "metrics.csv").write_text("step\n1\n")
    (folder / "samples.jsonl").write_text("{}\n")


def finished_sequence(root: Path) -> Path:
    """Lay out what an executed sequence leaves, without a kernel."""
    path = write_notebook(root, "01_a.ipynb", "x = 1  # one")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].execution_count = 1
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="made\n")]
    folder = root / "runs" / "smoke"
    for kind in ("figures", "tables"):
        (folder / kind).mkdir(parents=True)
    save_notebook(notebook, folder / "notebooks" / "01_a.ipynb", "smoke", root)
    (folder / "figures" / "curve.png").write_text("a picture")
    (folder / "tables" / "all.csv").write_text("a\n1\n")
    (folder / "cost.json").write_text("{}")
    policies = folder / "policies"
    make_run(policies / "scalar" / "seed0", "finished", "new")
    make_run(policies / "scalar_average" / "test", "finished", "new")
    make_run(policies / "scalar" / "seed1", "running", "new")
    for aside in ("seed0@0123", "seed0/test@damaged", "seed0@0123/test", ".seed0.0a.partial"):
        make_run(policies / "scalar" / aside, "finished", "set aside")
    return path


def test_publish_copies_the_small_files_of_finished_runs(tmp_path: Path):
    path = finished_sequence(tmp_path)
    place = "smoke/policies/scalar/seed0"
    for run in (place, f"{place}/test"):
        make_run(tmp_path / "results" / run, "finished", "old")
    edited = nbformat.read(path, as_version=4)
    edited.cells[0].source = "# A better title"
    nbformat.write(edited, path)

    publish("smoke", tmp_path)

    results = tmp_path / "results"
    files = {p.relative_to(results).as_posix() for p in results.rglob("*") if p.is_file()}
    assert files == {
        *(f"{place}/{name}" for name in FILES),
        *(f"{place}/test/{name}" for name in (*FILES, "checkpoint/adapter.safetensors")),
        *(f"smoke/policies/scalar_average/test/{name}" for name in FILES),
        "figures/curve.png",
        "tables/all.csv",
        "smoke/cost.json",
    }
    values = [
        json.loads((results / run / "run.json").read_text())["value"]
        for run in (place, f"{place}/test")
    ]
    assert values == ["new", "old"], "a published run took the one nested in it along"
    published = nbformat.read(path, as_version=4)
    assert published.cells[0].source == "# A better title"
    assert "made" in text_of(published)
    assert published.metadata.report["code_hash"] == code_hash(published)


def test_large_samples_are_published_packed(tmp_path: Path):
    rows = [{"prompt_id": f"p{i}", "response": "Grüße\u2028" * 100} for i in range(800)]
    for name, own in {"large": rows, "small": rows[:5]}.items():
        make_run(tmp_path / name, "finished", "new")
        write_jsonl(tmp_path / name / "samples.jsonl", own)
        copy_run(tmp_path / name, tmp_path / "results" / name)
        assert read_jsonl(tmp_path / "results" / name / "samples.jsonl") == own
    large, small = (tmp_path / "results" / name for name in ("large", "small"))
    assert (tmp_path / "large" / "samples.jsonl").stat().st_size > LARGE
    assert {path.name for path in small.glob("samples*")} == {"samples.jsonl"}
    assert {path.name for path in large.glob("samples*")} == {"samples.jsonl.gz"}
    first = (large / "samples.jsonl.gz").read_bytes()
    assert len(first) < LARGE
    assert first[4:8] == bytes(4), "the time of packing would make other bytes of the same rows"
    copy_run(large, large)
    copy_run(tmp_path / "large", tmp_path / "again")
    assert first == (large / "samples.jsonl.gz").read_bytes(), "packed twice, or lost"
    assert first == (tmp_path / "again" / "samples.jsonl.gz").read_bytes()


def test_publish_refuses_outputs_of_other_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = finished_sequence(tmp_path)
    path.write_text(path.read_text().replace("x = 1", "x = 2"))
    assert main(["--profile", "smoke", "--publish"], root=tmp_path) == 1
    assert "01_a.ipynb has changed" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_publish_needs_an_execution(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_notebook(tmp_path, "01_a.ipynb", "1")
    assert main(["--profile", "smoke", "--publish"], root=tmp_path) == 1
    assert "nothing to publish" in capsys.readouterr().err


def test_the_code_hash_sees_code_alone():
    def hash_of(source: str, *more: nbformat.NotebookNode) -> str:
        return code_hash(new_notebook(cells=[new_code_cell(source), *more]))

    plain = hash_of("x = f('#1')\ny = 2")
    assert hash_of("# why\nx = f('#1')  # one\n\ny = 2\n") == plain
    assert hash_of("x = f('#2')\ny = 2") != plain, "this is no comment"
    assert hash_of("x = f('#1')\n  # y = 2") != plain
    assert hash_of("x = f('#1')\ny = 2", new_markdown_cell("Prose.")) == plain
    assert hash_of("x = f('#1')\ny = 2", new_code_cell("z = 3")) != plain
    colab = new_code_cell("!git clone it", metadata={"tags": ["colab"]})
    assert hash_of("x = f('#1')\ny = 2", colab) == plain
