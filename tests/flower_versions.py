"""Run the Flower tests with several versions of flwr, each in an environment of its own.

    python tests/flower_versions.py 1.24.0 1.36.0 newest

An environment holds one version of flwr and those of its dependencies that the running
interpreter does not have in a fitting version. Everything else, torch above all, is the running
interpreter's, found through a ``.pth`` file that comes after the environment's own packages: some
30 MB and a few seconds a version. Environments are kept in a cache folder and used again.

Prints one line a version, and the end of pytest's output where it failed; exits with 1 if any
version failed, could not be installed, or ran no test.
"""

from __future__ import annotations

import argparse
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache" / "fedobd-test"

TESTS = "tests/test_flower_*.py"
PYTEST_OPTIONS = ("-m", "not deployment", "-p", "no:cacheprovider", "-n", "auto")

NEWEST = "newest"
NUM_LINES_SHOWN = 60


class InstallError(Exception):
    """pip could not install a version."""


def shared_folders() -> list[str]:
    """Return where the running interpreter's packages are."""
    candidates = [*site.getsitepackages(), site.getusersitepackages()]
    return [folder for folder in candidates if folder in sys.path]


def make_environment(folder: Path) -> Path:
    """Make an environment, or take the one that is there, and return its interpreter."""
    python = folder / "bin" / "python"
    made_for = folder / "made_for.txt"
    interpreter = f"{sys.base_prefix} {sys.version}"
    if not made_for.exists() or made_for.read_text() != interpreter:
        venv.EnvBuilder(clear=True, with_pip=False, symlinks=True).create(folder)
        made_for.write_text(interpreter)
    # written anew each time: the cache outlives the environment that this script runs in;
    # addsitedir instead of a bare path, so that editable installs in the shared folder are seen
    lines = [f"import site; site.addsitedir({shared!r})\n" for shared in shared_folders()]
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / name / "site-packages" / "zz_shared.pth").write_text("".join(lines))
    return python


def install(python: Path, version: str) -> str:
    """Install a version of flwr, unless it is there, and return which one there is now.

    Raises:
        InstallError: With pip's last error.
    """
    if version != NEWEST and installed_version(python) == version:
        return version
    wanted = ["--upgrade", "flwr"] if version == NEWEST else [f"flwr=={version}"]
    # pip itself is the running interpreter's, too
    options = ["--quiet", "--disable-pip-version-check"]
    command = [str(python), "-m", "pip", "install", *options, *wanted]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["pip said nothing"]
        errors = [line for line in lines if line.startswith("ERROR:")]
        raise InstallError((errors or lines)[-1])
    return installed_version(python)


def installed_version(python: Path) -> str:
    """Return the version of flwr that an interpreter finds, or an empty string."""
    code = (
        "from importlib.metadata import distributions\n"
        "print(next((d.version for d in distributions(name='flwr')), ''))"
    )
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def run_tests(python: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the tests, with pytest's output and errors in one text."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),  # this checkout, whatever is installed
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    tests = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(TESTS))]
    return subprocess.run(
        [python, "-m", "pytest", *tests, *PYTEST_OPTIONS],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def check(version: str) -> bool:
    """Test one version, print its line, and return whether it passed."""
    folder = CACHE / f"flwr-{version}"
    try:
        python = make_environment(folder)
        found = install(python, version)
    except InstallError as error:
        print(f"flwr {version}: NOT INSTALLED: {error}", flush=True)
        return False
    label = f"{found} ({NEWEST})" if version == NEWEST else found
    result = run_tests(python, folder)
    lines = result.stdout.rstrip().splitlines() or ["pytest said nothing"]
    passed = result.returncode == 0  # pytest exits with 5 where it ran no test
    print(f"flwr {label}: {'passed' if passed else 'FAILED'}: {lines[-1].strip(' =')}", flush=True)
    if not passed:
        print("\n".join(lines[-NUM_LINES_SHOWN:]), file=sys.stderr, flush=True)
    return passed


def main() -> int:
    """Test the versions that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="+", help=f"such as 1.24.0, or {NEWEST}")
    versions = parser.parse_args().versions
    if not list(ROOT.glob(TESTS)):
        print(f"no file fits {TESTS}", file=sys.stderr)
        return 1
    results = [check(version) for version in versions]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
