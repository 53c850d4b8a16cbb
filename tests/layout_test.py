"""Where things are, as rules: a name says what a file is, and imports go one way."""

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from experiments.reporting import markdown, pages, rows
from experiments.reporting.table import available_tables, find_cells, find_table
from experiments.training.checkout import RESULTS

ROOT = Path(__file__).parent.parent
FILES = [
    file.relative_to(ROOT)
    for folder in ("ops", "models", "experiments", "launch")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
TREES = {file: ast.parse((ROOT / file).read_text("utf-8")) for file in FILES}


def names(folder: str) -> set[str]:
    """Files and packages in a folder, without hidden ones."""
    found = {path.stem for path in (ROOT / folder).iterdir() if path.suffix in ("", ".py")}
    return {name for name in found if not name.startswith(("_", "."))}


def definitions(file: Path) -> set[str]:
    return {
        name
        for node in TREES[file].body
        for name in (
            [target.id for target in node.targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.Assign)
            else [getattr(node, "name", "")]
        )
    }


# --- Imports

# Rooms, and those that each may import besides itself. LEAVES import nothing of ours, and all of
# experiments and launch may import them.
MAY_IMPORT = {
    "ops/framework": "",
    "ops/chunks": "ops/framework",
    "ops/tpu": "ops/framework ops/chunks",
    "ops/gpu": "ops/framework ops/chunks",
    "ops": "ops/framework ops/chunks ops/tpu ops/gpu",
    "models/parts": "ops ops/framework",
    "models": "models/parts ops ops/framework",
    "models/blocks": "models models/parts ops ops/framework",
    "models/networks": "models/blocks models models/parts ops ops/framework",
    "models/weights": "",
    "experiments/configs": "",
    "experiments/objectives": "models/parts",
    "experiments/compiled": "ops/framework",
    "experiments/conversion": "experiments/training experiments/configs models/blocks"
    " models/weights",
    "experiments/training": "experiments/objectives experiments/compiled models/networks"
    " models/blocks models/parts ops",
    "experiments/separation": "",
    "experiments/sampling": "experiments/training experiments/objectives models/parts",
    "experiments/tasks": "experiments/training experiments/objectives models/parts",
    "experiments/reporting": "experiments/training",
    "experiments/tables/computations": "experiments experiments/configs experiments/reporting"
    " experiments/training models models/networks models/blocks models/parts ops",
    "experiments/tables": "experiments/reporting experiments/tables/computations",
    "experiments/sweeps": "experiments/tables experiments/reporting",
    "experiments/benchmarks": "experiments/training experiments/compiled ops ops/framework",
    "experiments": "experiments/tasks experiments/sampling experiments/separation"
    " experiments/training experiments/objectives experiments/compiled experiments/reporting"
    " experiments/configs experiments/conversion models/weights",
    "launch": "experiments/reporting",
}
LEAVES = {
    f"experiments/training/{name}.py"
    for name in ("checkout", "command_line", "config", "process_setup")
}
# An op that is made of another.
OPS_OF_OPS = {
    ("flow_attention", "bidirectional_linear_attention"),
    ("causal_flow_attention", "gated_linear_attention"),
    ("polynomial_kronecker_attention", "kronecker_attention"),
    ("long_convolution", "short_convolution"),
    ("dense_scan", "long_convolution"),
    ("dense_scan", "state_passing"),
    ("diagonal_convolution", "long_convolution"),
    ("diagonal_convolution", "state_passing"),
}


def imported_files(file: Path) -> Iterator[Path]:
    """Files of ours that a file imports, anywhere in it."""
    for node in ast.walk(TREES[file]):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = file.parts[:-1][: len(file.parts) - node.level] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            modules = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for module in modules:
            path = Path(*module.split("."))
            yield from {path.with_suffix(".py"), path / "__init__.py"} & TREES.keys()


IMPORTS = {file: set(imported_files(file)) - {file} for file in FILES}


def room(file: Path) -> str:
    return max((r for r in MAY_IMPORT if file.is_relative_to(r)), key=len)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_go_one_way(name: str) -> None:
    allowed = {name, *MAY_IMPORT[name].split()}
    for file in FILES:
        for other in IMPORTS[file] if room(file) == name else ():
            leaf = str(other) in LEAVES and file.parts[0] in ("experiments", "launch")
            package = other.name == "__init__.py" and str(other.parent) in ("models", "ops")
            assert leaf or package or room(other) in allowed, f"{file} imports {other}"


def test_leaves_import_nothing_of_ours_but_leaves() -> None:
    for leaf in LEAVES:
        assert {str(other) for other in IMPORTS[Path(leaf)]} <= LEAVES


def test_no_import_goes_in_a_circle() -> None:
    """An import of a name in a package executes the package first: `ops` imports every op."""
    packages = {Path("ops/__init__.py"), Path("models/__init__.py")}
    TopologicalSorter({file: IMPORTS[file] - packages for file in FILES}).prepare()


def test_an_op_imports_another_only_where_it_is_made_of_it() -> None:
    found = {
        (file.parts[1], other.parts[1])
        for file in FILES
        for other in IMPORTS[file]
        if room(file) == room(other) == "ops" and len(file.parts) > 2 < len(other.parts)
    }
    assert {(op, other) for op, other in found if op != other} == OPS_OF_OPS


def test_what_a_launcher_reads_imports_no_jax() -> None:
    folders = ("configs", "tables", "sweeps", "reporting")
    files = [
        file
        for file in FILES
        if file.parts[0] == "launch"
        or (file.parts[1] in folders and file.parts[2] != "computations")
    ]
    modules = [".".join(file.with_suffix("").parts) for file in files]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "found = {'jax', 'flax', 'optax', 'ops', 'models'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- Names

BENCHMARKS = ("ops", "small_runs", "gpu", "gpu_training", "tpu_aot", "gpu_aot")
ALSO_COMMANDS = {
    "launch/sweep.py",
    "experiments/sweeps/scaling_law.py",
    # Runs itself in a process with eight devices.
    "experiments/tables/computations/sequence_timing.py",
}


def test_what_is_directly_in_experiments_is_a_command_and_nothing_else_is() -> None:
    commands = {str(file) for file in FILES if file.parts[:-1] == ("experiments",)}
    commands |= {f"experiments/benchmarks/{name}.py" for name in BENCHMARKS} | ALSO_COMMANDS
    last = {str(file): ast.unparse(tree.body[-1]) for file, tree in TREES.items() if tree.body}
    assert {file for file, code in last.items() if code.startswith("if __name__ == ")} == commands


def test_what_is_directly_in_models_is_a_paper() -> None:
    for name in names("models") - {"blocks", "networks", "parts", "weights"}:
        file = Path("models", name, "__init__.py")
        file = file if file in TREES else Path("models", f"{name}.py")
        assert "Mixer" in definitions(file), file
    for name in names("models/networks"):
        assert "build" in definitions(Path("models/networks", f"{name}.py")), name


def test_a_part_has_two_users() -> None:
    """Papers, networks and objectives; a helper of one lives with it."""
    users = defaultdict(set)
    for file in FILES:
        for other in IMPORTS[file] - {file}:
            users[other].add(file.parts[:2])
    count = {name: len(users[Path("models/parts", f"{name}.py")]) for name in names("models/parts")}
    assert {name for name, number in count.items() if number < 2} == set()


OP_FILES = {"api", "reference", "xla", "sequence_parallel", "examples", "pallas_tpu", "pallas_gpu"}
OTHER_OP_FILES = {
    "long_convolution/documents",
    "window_attention/ring",
    "selective_scan/gating",
    "state_passing/parts",
    "dense_scan/powers",
}
OPS = sorted(path.parent.name for path in (ROOT / "ops").glob("*/api.py"))


@pytest.mark.parametrize("op", OPS)
def test_a_folder_with_an_api_is_an_op(op: str) -> None:
    found = names(f"ops/{op}")
    assert {"api", "reference", "examples"} <= found
    assert {f"{op}/{name}" for name in found - OP_FILES} <= OTHER_OP_FILES
    for node in ast.walk(TREES[Path("ops", op, "reference.py")]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.names[0].name if isinstance(node, ast.Import) else node.module
            own = isinstance(node, ast.ImportFrom) and node.level
            first = (module or "").split(".")[0]
            assert not own and (first == "jax" or first in sys.stdlib_module_names)


# --- Tests

# A file has a test of its own, at the same path below tests/, or one that it shares: of its folder,
# or this one.
TESTED_BY = {
    "ops/chunks": "contracts/ops.py",
    "ops/framework": "contracts/ops.py",
    "ops/gpu": "ops/gpu/lowering_test.py",
    "ops/tpu": "ops/tpu/interpreter_test.py",
    "models/parts": "contracts/mixers_test.py",
    "models/blocks/backbone.py": "models/networks/lm_test.py",
    "models/blocks/hyper_block.py": "models/networks/hyper_zzw_test.py",
    "models/blocks/hyper_kernels.py": "models/networks/hyper_zzw_test.py",
    "models/blocks/standardisation.py": "models/networks/hyper_zzw_test.py",
    "models/blocks/patches.py": "models/networks/image_classifier_test.py",
    "models/blocks/voxel_block.py": "models/networks/point_cloud_test.py",
    "models/weights": "experiments/convert_test.py",
    "experiments/benchmarks/matrix_states.py": "experiments/benchmarks/tpu_aot_test.py",
    "experiments/benchmarks/peers": "experiments/benchmarks/gpu_test.py",
    "experiments/benchmarks/programs": "experiments/benchmarks/tpu_aot_test.py",
    "experiments/check.py": "launch/sweep_file_test.py",
    "experiments/conversion": "experiments/convert_test.py",
    "experiments/compiled/step_cost.py": "experiments/plan_test.py",
    "experiments/evaluate.py": "experiments/train_test.py",
    "experiments/html_report.py": "experiments/reporting/html_test.py",
    "experiments/objectives/evaluation.py": "experiments/train_test.py",
    "experiments/objectives/objective.py": "experiments/objectives/next_token_test.py",
    "experiments/reporting": "experiments/tables_test.py",
    "experiments/reproduce.py": "experiments/tables_test.py",
    "experiments/sample.py": "experiments/sampling/pictures_test.py",
    "experiments/tasks/induction_heads.py": "experiments/tasks/mad_test.py",
    "experiments/tasks/pathfinder.py": "experiments/tasks/long_range_arena_test.py",
    "experiments/tasks/retrieval.py": "experiments/tasks/long_range_arena_test.py",
    "experiments/tasks/text_classification.py": "experiments/tasks/long_range_arena_test.py",
    "experiments/tasks/sources/augmentations.py": "experiments/tasks/image_classification_test.py",
    "experiments/tasks/sources/byte_documents.py": "experiments/tasks/long_range_arena_test.py",
    "experiments/tasks/sources/image_sets.py": "experiments/tasks/images_test.py",
    "experiments/tasks/sources/lra_release.py": "experiments/tasks/long_range_arena_test.py",
    "experiments/tasks/sources/path_drawings.py": "experiments/tasks/long_range_arena_test.py",
    "experiments/tasks/sources/point_files.py": "experiments/tasks/point_clouds_test.py",
    "experiments/tasks/sources/shapes.py": "experiments/tasks/point_clouds_test.py",
    "experiments/tasks/sources/series.py": "experiments/tasks/forecasting_test.py",
    "experiments/tasks/sources/sound_files.py": "experiments/tasks/separation_test.py",
    "experiments/tasks/sources/speech.py": "experiments/tasks/separation_test.py",
    "experiments/tasks/sources/text_builder.py": "experiments/tasks/text_test.py",
    "experiments/tasks/sources/text_corpus.py": "experiments/tasks/text_corpus_test.py",
    "experiments/tasks/sources/text_tokenizer.py": "experiments/tasks/text_tokenizer_test.py",
    "experiments/tasks/sources/tfds_source.py": "experiments/tasks/images_test.py",
    "experiments/tasks/sources/voices.py": "experiments/tasks/separation_test.py",
    "experiments/training/checkout.py": "experiments/tables_test.py",
    "experiments/training/command_line.py": "experiments/training/config_test.py",
    "experiments/training/evaluation.py": "experiments/train_test.py",
    "experiments/training/header.py": "experiments/train_test.py",
    "experiments/training/loop.py": "experiments/train_test.py",
    "experiments/training/metrics.py": "experiments/training/progress_test.py",
    "experiments/training/metrics_file.py": "experiments/training/progress_test.py",
    "experiments/training/program.py": "experiments/train_test.py",
    "experiments/training/prompts.py": "experiments/generate_test.py",
    "experiments/training/refined_schedule.py": "experiments/training/optimizer_test.py",
    "experiments/training/run_loading.py": "experiments/training/resume_test.py",
    "experiments/training/speed.py": "experiments/training/progress_test.py",
    "experiments/training/state.py": "experiments/train_test.py",
    "experiments/training/step.py": "experiments/train_test.py",
    "launch": "launch/sweep_test.py",
}


def test_every_file_has_a_test() -> None:
    used = set()
    for file in FILES:
        own = [file.with_suffix(""), *file.parents[:-2]]
        if file.name == "__init__.py" or any(
            (ROOT / "tests" / f"{place}_test.py").exists() for place in own
        ):
            continue
        shared = [str(place) for place in (file, *file.parents) if str(place) in TESTED_BY]
        assert shared, f"{file} has no test"
        used.add(shared[0])
    assert used == set(TESTED_BY), "these have tests of their own now"
    for test in TESTED_BY.values():
        assert (ROOT / "tests" / test).exists(), test


# --- Length

LONGEST = 80  # lines of code, without docstring, comments and blank lines


def test_functions_are_short() -> None:
    found = set()
    for file, tree in TREES.items():
        lines = (ROOT / file).read_text("utf-8").split("\n")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1 if ast.get_docstring(node) and node.body[1:] else 0]
                header = lines[node.lineno - 1 : node.body[0].lineno - 1]
                own = (*header, *lines[first.lineno - 1 : node.end_lineno])
                if sum(bool(line.strip()) and line.strip()[0] != "#" for line in own) > LONGEST:
                    found.add((str(file), node.name))
    assert not found


# --- Results

# Cells with a row, of all that are not gaps.
FILLED = {
    "equivalences cpu": 47,
    "forecasting cpu": 28,
    "hyper_zzw cpu": 12,
    "icl_regression cpu": 10,
    "kronecker_error cpu": 16,
    "lasp2_scaling cpu": 84,
    "lasp2_timed cpu": 21,
    "load_balancing cpu": 6,
    "mad cpu": 30,
    "mqar cpu": 33,
    "ptd_robustness cpu": 84,
    "s4d_initialization cpu": 24,
    "selective_copying_induction cpu": 25,
    "separation cpu": 6,
    "state_tracking cpu": 15,
    "state_tracking demo": 4,
}


def test_no_recorded_row_is_lost() -> None:
    found = Counter()
    for name in available_tables():
        table, recorded = find_table(name), rows.read(name)
        for scale in table.SCALES:
            found[f"{name} {scale}"] += sum(
                row is not None for row in rows.matching(find_cells(table, scale), recorded, scale)
            )
    assert {name: count for name, count in found.items() if count} == FILLED


def test_the_page_of_results_is_that_of_the_rows(tmp_path: Path) -> None:
    for file in RESULTS.glob("*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pages.renew(tmp_path)
    made, recorded = (
        # Where code has changed since is true of the commit that the page was made at.
        re.sub(rf"^{markdown.SEEN} .*$", "", (folder / "RESULTS.md").read_text("utf-8"), flags=re.M)
        for folder in (tmp_path, RESULTS)
    )
    assert made == recorded
