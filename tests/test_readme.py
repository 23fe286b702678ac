"""README.md and experiments/README.md: snippets print what they say, links lead somewhere, flags and tests exist."""

import contextlib
import functools
import importlib
import io
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "experiments/README.md")}
README = PAGES["README.md"]
# of accelerate launch
LAUNCHER = {"--config_file", "--machine_rank", "--main_process_ip", "--multi_gpu", "--num_processes", "--cpu"}


def test_the_readme_is_for_one_sitting():
    assert len(README.splitlines()) <= 230 and len(README.split()) <= 2000


def test_snippets_print_what_their_comments_say():
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) == 3
    for snippet in snippets:
        expected = re.findall(r"^print\(.*\)  # (.*)$", snippet, re.M)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(snippet, {})
        assert expected and printed.getvalue().splitlines() == expected


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target.read_text()), link


@functools.cache
def flags_of(script: str) -> set[str]:
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z]\w*", done.stdout))


@pytest.mark.parametrize("name", PAGES)
def test_flags_exist(name):
    """Those of a command, in its script; those that stand alone, in one of the scripts."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGES[name].replace("\\\n", ""), re.S)
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", PAGES[name], flags=re.S))
    seen = set()
    for line in [line for block in blocks for line in block.splitlines()] + inline:
        command = re.search(r"\b(maskgrpo|upo|rewards)\.py(.*)", line, re.S)
        if command:
            flags, known = command[2], flags_of(f"{command[1]}.py")
        elif line.startswith("--"):
            flags, known = line, {f for s in ("maskgrpo.py", "upo.py", "rewards.py") for f in flags_of(s)} | LAUNCHER
        else:
            continue
        unknown = set(re.findall(r"(?<![\w-])--[a-z]\w*", flags)) - known
        assert not unknown, f"{line}: {unknown}"
        seen.add(line)
    assert len(seen) > 5


def test_functions_and_tests_beside_the_paper_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    rows = re.findall(r"^\| .* \| (`.*`) \| `(test_\w+)` \|$", README, re.M)
    assert len(rows) > 12
    for functions, test in rows:
        assert f"def {test}(" in tests, test
        for module, function in re.findall(r"`(\w+)\.(\w+)`", functions):
            assert hasattr(importlib.import_module(module), function), f"{module}.{function}"
