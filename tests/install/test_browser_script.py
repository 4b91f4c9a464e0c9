"""tools/browser.sh with stubs of the system's programs that record their arguments."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALL = 'echo "$DEBIAN_FRONTEND $*" >> calls'
MAKES_A_BROWSER = (
    f"{INSTALL}; if [ $1 = install ]; then printf '#!/bin/sh\\n' > bin/chromium; /bin/chmod +x bin/chromium; fi"
)


def called(folder: Path, **programs: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a folder, with these programs and no others in the PATH."""
    (folder / "bin").mkdir()
    for name, text in programs.items():
        path = folder / "bin" / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    command = ["/bin/sh", str(ROOT / "tools" / "browser.sh")]
    return subprocess.run(
        command, cwd=folder, env={"PATH": str(folder / "bin")}, capture_output=True, text=True, timeout=20
    )


@pytest.mark.parametrize("name", ["chromium", "chromium_browser", "google_chrome"])
def test_a_browser_that_is_there_is_enough(tmp_path, name):
    done = called(tmp_path, id="echo 0", apt_get=INSTALL, **{name: ""})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("programs", [{"id": "echo 1000", "apt_get": INSTALL}, {"id": "echo 0"}])
def test_without_root_or_apt_it_says_what_to_install(tmp_path, programs):
    done = called(tmp_path, **programs)
    assert done.returncode == 1
    assert "no browser was found: install Chromium" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_chromium_is_installed_without_a_question_even_if_a_source_is_broken(tmp_path):
    apt_get = f"if [ $1 = update ]; then exit 100; fi; {MAKES_A_BROWSER}"
    done = called(tmp_path, id="echo 0", apt_get=apt_get)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls == "noninteractive install --yes -qq --no-install-recommends chromium fonts-dejavu-core\n"


@pytest.mark.parametrize(
    ("apt_get", "says"),
    [("if [ $1 = install ]; then exit 100; fi", "Chromium could not be installed"), ("", "no browser is in the PATH")],
)
def test_an_installation_that_brings_no_browser_is_an_error(tmp_path, apt_get, says):
    done = called(tmp_path, id="echo 0", apt_get=apt_get)
    assert done.returncode == 1
    assert says in done.stderr


def test_the_script_and_the_tests_look_for_the_same_browsers():
    script, tests = ROOT / "tools" / "browser.sh", ROOT / "tests" / "trainer" / "report" / "test_browser.py"
    (names,) = (line for line in script.read_text().splitlines() if line.strip().startswith("for name in"))
    wanted = names.strip().removeprefix("for name in ").removesuffix("; do").split()
    assert f"({', '.join(repr(name) for name in wanted)})".replace("'", '"') in tests.read_text()
