"""The README and the house: every command is one that works, every name is where it says."""

import re
import shlex
import subprocess
import sys

import pytest
from scripts import ROOT

import utils

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    part for block in BLOCKS for line in block.splitlines() for part in line.split(" && ") if part
]


def test_readme_has_commands_and_no_gaps():
    assert len(COMMANDS) >= 10 and README.count("\n") <= 172
    assert not re.search(r"^[A-Z_]+$|\b(TODO|XX+)\b", README, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_names_files_and_flags_that_exist(command):
    words = shlex.split(command)
    if words[:2] == ["pip", "install"]:
        files = [word for word in words if word.endswith(".txt")]
        assert files and all((ROOT / file).exists() for file in files)
        return
    assert words[0] in ("python", "torchrun")
    if words[1:3] == ["-m", "pytest"]:
        return
    script = next(word for word in words if word.endswith(".py"))
    flags = words[words.index(script) + 1 :]
    if "--help" not in flags:
        utils.parse_flags(str(ROOT / script), flags)


def test_seven_packages_are_needed_to_run():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {re.split(r"[<>=]", line)[0] for line in lines}
    torch_family, rest = {"torch", "torchvision"}, {"scikit-learn", "matplotlib", "seaborn"}
    assert names == torch_family | rest | {"numpy", "tqdm"}


def test_top_level_holds_what_the_readme_says_and_no_more():
    try:
        command = ["git", "ls-files"]
        files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in files.splitlines()}
    scripts = {"train.py", "evaluate.py", "model.py", "data.py", "utils.py"}
    folders = {"requirements.txt", "README.md", "tests", "checkpoints"}
    assert {name for name in names if not name.startswith(".")} == scripts | folders


def test_data_model_and_utils_import_nothing_of_ours():
    ours = "(train|evaluate|data|model|utils)"
    for name in ("data", "model", "utils"):
        source = (ROOT / f"{name}.py").read_text()
        assert not re.search(rf"^\s*(import|from) {ours}\b", source, re.MULTILINE)


def test_training_does_not_wait_for_what_only_evaluation_needs():
    """Importing train.py brings in neither scikit-learn nor plots, which take seconds."""
    code = "import sys, train; print({'sklearn', 'matplotlib', 'seaborn'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
