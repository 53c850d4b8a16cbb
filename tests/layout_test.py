"""What the documents say is what the tree is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.configs.recipes.base import available_recipes

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "ops": set(),
    "models": {"ops", "models"},
    "experiments": {"ops", "models", "experiments"},
    "launch": {"launch", "experiments"},
}


def project_imports(path):
    """(first part, whole name) of every absolute import of a project folder, anywhere in the
    file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        yield from (
            (name.split(".")[0], name)
            for name in names
            if name.split(".")[0] in {*MAY_IMPORT, "tests"}
        )


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_down_only(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for top, name in project_imports(path):
            assert top in MAY_IMPORT[folder], f"{path.relative_to(ROOT)} imports {name}"


def test_launchers_can_read_configs_and_tables_without_jax():
    files = [
        *(ROOT / "experiments/configs").glob("*.py"),
        *(ROOT / "experiments/tables").glob("*.py"),
    ]
    assert files
    for path in [*files, ROOT / "experiments/reporting/table.py"]:
        assert not re.search(
            r"^\s*(from|import) (jax|flax|optax|models|ops)\b",
            path.read_text("utf-8"),
            re.MULTILINE,
        )


def test_a_launcher_starts_without_jax():
    code = "import sys, launch.sweep; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def mixers():
    names = {path.stem for path in (ROOT / "models").iterdir() if path.name[0] not in "._"}
    return names - {"networks", "parts"}


def test_the_readme_lists_exactly_the_models():
    listed = set(
        re.findall(
            r"^\| \[`(\w+)`\]\(models/[\w/]+\.py\)",
            (ROOT / "README.md").read_text("utf-8"),
            re.MULTILINE,
        )
    )
    assert listed == mixers() | {"linear_self_attention"}


def test_every_model_has_a_config():
    configs = {path.stem for path in (ROOT / "experiments/configs").glob("*.py")}
    only_in_hybrids = {"window_attention", "base_conv"}
    assert mixers() - only_in_hybrids <= configs


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_commands_and_files_in_documents_exist(document):
    text = (ROOT / document).read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    commands = re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)
    assert commands and set(commands) <= targets, set(commands) - targets
    for module in re.findall(r"python -m ((?:experiments|launch)[.\w]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        assert path.startswith("http") or (ROOT / path).exists(), path
    for config, task in re.findall(r"--config=(experiments/configs/\w+\.py):(\w+)", text):
        assert (ROOT / config).exists(), config
        assert task in available_recipes(), task
