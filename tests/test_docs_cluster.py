"""Every command of docs/cluster.md exists: its options parse, and the files that it names are there."""

import re
import shlex
from pathlib import Path

import click
import pytest

from mim import __main__, config

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "cluster.md").read_text()
COMMANDS = [line.strip() for line in PAGE.splitlines() if re.match(r"    (mim|torchrun|accelerate) ", line)]


@pytest.mark.parametrize("text", COMMANDS)
def test_a_command_of_the_page_parses_with_a_recipe_that_exists(text):
    arguments = shlex.split(re.sub(r"^.*?(-m )?\bmim ", "", text, count=1))
    command, context = __main__.cli, click.Context(__main__.cli, info_name="mim")
    while isinstance(command, click.Group):
        name, command, arguments = command.resolve_command(context, arguments)
    made = command.make_context(name, list(arguments), parent=context)
    if made.params.get("recipe"):
        config.read(made.params["recipe"], made.params["overrides"])


def test_the_page_has_commands_for_every_way_to_start():
    assert len(COMMANDS) >= 10
    assert {text.split()[0] for text in COMMANDS} == {"mim", "torchrun", "accelerate"}


def test_the_files_that_the_page_names_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    named = re.findall(r"\b(?:configs|scripts|tests)/[\w/.-]+\.(?:yaml|py|sbatch)", PAGE)
    assert links
    assert named
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
    for name in named:
        assert (ROOT / name).exists(), name
