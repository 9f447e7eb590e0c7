"""The README and the house: every command is one that works, every name is where it says."""

import re
import shlex
import subprocess
import sys

import pytest
from scripts import ROOT, run_script

import utils

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in re.split(" && |\n", block) if line]


def test_readme_has_commands_and_no_gaps():
    assert len(COMMANDS) >= 10 and README.count("\n") <= 172
    assert not re.search(r"^[A-Z_]+$|\b(TODO|XX+)\b", README, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_names_files_and_flags_that_exist(command):
    program, *words = shlex.split(command)
    if program == "pip":
        assert words[:2] == ["install", "-r"] and (ROOT / words[2]).exists()
        return
    assert program in ("python", "torchrun")
    if words != ["-m", "pytest"]:
        place, script = next((i, word) for i, word in enumerate(words) if word.endswith(".py"))
        utils.parse_flags(str(ROOT / script), words[place + 1 :])


def test_seven_packages_are_needed_to_run():
    names = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    expected = "torch torchvision scikit-learn matplotlib seaborn numpy tqdm"
    assert sorted(names) == sorted(expected.split())


def test_top_level_holds_what_the_readme_says_and_no_more():
    status, files = subprocess.getstatusoutput(f"git -C {shlex.quote(str(ROOT))} ls-files")
    if status:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in files.splitlines() if not line.startswith(".")}
    expected = "train.py evaluate.py model.py data.py utils.py requirements.txt README.md tests"
    assert names == {*expected.split(), "checkpoints"}


def test_data_and_model_import_utils_alone_and_utils_nothing_of_ours():
    ours = re.compile(r"^\s*(?:import|from) (train|evaluate|data|model|utils)\b", re.MULTILINE)
    for name, imported in (("data", ["utils"]), ("model", ["utils"]), ("utils", [])):
        assert ours.findall((ROOT / f"{name}.py").read_text()) == imported


def print_what_train_imports() -> None:
    names = list(sys.modules)  # in the order in which their imports ended
    print(*names[: names.index("train")])


def test_training_does_not_wait_for_what_only_evaluation_needs(tmp_path):
    """The scripts' server imports train.py first: neither scikit-learn nor plots come with it."""
    script = run_script("train.py", "--help", cwd=tmp_path, prepare=print_what_train_imports)
    names = script.stdout.splitlines()[0].split()
    assert {"utils", "torch"} <= {*names}
    assert not {"evaluate", "sklearn", "matplotlib", "seaborn"} & {*names}
