"""What the documents say is what the tree is."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from experiments.configs.recipes.base import available_recipes
from models.blocks.stack import available_mixers

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("experiments/**/*.py"), *ROOT.glob("launch/*.py"))
    if "command_line.run(main" in path.read_text("utf-8")
)
# Papers that are whole models.
NETWORKS = (*("linear_self_attention", "linear_forecaster", "diffusion_transformer", "hyper_zzw"),)
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "experiments/MESH.md"]


def test_the_readme_lists_exactly_the_models() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    listed = re.findall(r"^\| \[`(\w+)`\]\(models/[\w/]+\.py\)", text, re.MULTILINE)
    assert sorted(listed) == sorted({*available_mixers(), *NETWORKS})


def test_the_readme_names_the_ops_of_a_model() -> None:
    """Those that it imports itself are among those that it has through parts."""
    text = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| \[`\w+`\]\((models/.+?)\) \|.*?\|.*?\| (.*?) \|", text, re.MULTILINE)
    assert len(rows) == len(available_mixers()) + len(NETWORKS)
    for path, listed in rows:
        package = path.endswith("__init__.py")
        files = (ROOT / path).parent.glob("*.py") if package else [ROOT / path]
        source = "".join(file.read_text("utf-8") for file in files)
        ops = set(re.findall(r"`(\w+)`", listed))
        assert (ops or listed == "-") and set(
            re.findall(r"from ops\.(\w+)\.api import", source)
        ) <= ops, path
        assert all((ROOT / "ops" / op / "api.py").exists() for op in ops), path


def test_every_model_has_a_config() -> None:
    configs = {path.stem for path in (ROOT / "experiments/configs").glob("*.py")}
    only_in_hybrids = {"window_attention", "base_conv"}
    assert set(available_mixers()) - only_in_hybrids <= configs


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_files_in_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    commands = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert commands <= targets, commands - targets
    for module in re.findall(r"python -m ((?:experiments|launch)[.\w]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    folder = (ROOT / document).parent
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        assert path.startswith("http") or (folder / path).exists(), path
    # Paths in backquotes, if they name no placeholder.
    for path in re.findall(r"`((?:ops|models|experiments|launch|tests)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    for config, task in re.findall(r"--config=(experiments/configs/\w+\.py):(\w+)", text):
        assert (ROOT / config).exists(), config
        of_a_task = "def get_config(task" in (ROOT / config).read_text("utf-8")
        assert not of_a_task or task in available_recipes(), task


def commands(text: str) -> list[list[str]]:
    """The indented `python -m` commands of a text, as bash splits them."""
    lines = re.findall(r"^    (python -m (?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [shlex.split(line.replace("\\\n", ""), comments=True) for line in lines]


@pytest.mark.parametrize("file", COMMANDS, ids=str)
def test_the_help_of_a_command_shows_commands_that_it_takes(file: Path) -> None:
    source = (ROOT / file).read_text("utf-8")
    text = ast.get_docstring(ast.parse(source), clean=False) or ""
    for _, _, module, *arguments in commands(text):
        path = ROOT / (module.replace(".", "/") + ".py")
        defined = path.read_text("utf-8")
        flags = set(re.findall(r"""DEFINE_\w+\(\s*["'](\w+)["']""", defined))
        files = "files=True" in defined
        for argument in arguments:
            if files and re.fullmatch(r"\w+\.(wav|flac)", argument):
                continue
            assert re.fullmatch(r"--[\w.]+(=[^=].*)?", argument), argument
            name = argument[2:].split("=")[0].split(".")[0]
            assert name in flags or name.removeprefix("no") in flags, (argument, module)
            assert "..." not in argument, argument
