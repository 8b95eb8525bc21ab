"""The project's conventions, those that a program can check (CONTRIBUTING.md says the others)."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"goku_kernels": "kernels", "goku_runtime": "runtime", "goku": "."}
SOURCE_FOLDERS = ["kernels", "runtime", "goku", "bench", "tests", "csrc"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources(*suffixes: str, folders: list[str] = SOURCE_FOLDERS) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and "__pycache__" not in path.parts:
                yield path


def python_files(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sources(".py", folders=list(folders)):
        yield path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    line = f":{node.lineno}" if isinstance(node, ast.stmt | ast.expr | ast.ExceptHandler) else ""
    return f"{path.relative_to(ROOT)}{line}"


def test_there_is_something_to_check():
    assert len(list(python_files("kernels", "runtime", "goku"))) > 20


# ---- layout ----


@pytest.mark.parametrize("folder", ["kernels", "runtime", "csrc", "bench", "tests"])
def test_plain_folders_are_no_packages(folder):
    """An __init__.py in kernels/ would shadow Hugging Face's package of that name."""
    inner = [] if folder in ("kernels", "runtime") else (ROOT / folder).rglob("__init__.py")
    assert [place(path) for path in [*(ROOT / folder).glob("__init__.py"), *inner]] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package):
    assert (ROOT / PACKAGES[package] / package / "py.typed").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_with_modules_is_a_package(package):
    """A folder without __init__.py is left out of the wheel."""
    folders = {path.parent for path in (ROOT / PACKAGES[package] / package).rglob("*.py")}
    assert [place(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_every_operator_has_its_test():
    kernels = ROOT / "kernels" / "goku_kernels"
    # reference.py is what the operators' own tests compare and check.
    stems = {path.stem for path in kernels.glob("[!_]*.py")} - {"reference"}
    missing = [stem for stem in stems if not (ROOT / f"tests/kernels/test_{stem}.py").is_file()]
    assert sorted(missing) == []


def test_importing_the_kernels_imports_neither_triton_nor_the_compiler():
    code = (
        "import sys, goku_kernels; print('triton' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


FUSED = sorted(path.stem for path in (ROOT / "kernels/goku_kernels/triton/configs").glob("*.json"))


def test_there_are_fused_operators():
    assert len(FUSED) >= 6


@pytest.mark.parametrize("operator", FUSED)
def test_every_fused_operator_has_all_its_files(operator):
    wanted = [
        f"kernels/goku_kernels/{operator}.py",
        f"kernels/goku_kernels/triton/{operator}.py",
        f"tests/kernels/test_{operator}.py",
        f"tests/kernels/interpreter/test_{operator}.py",
        f"tests/gpu/test_{operator}.py",
        f"bench/{operator}.py",
    ]
    assert [name for name in wanted if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("operator", FUSED)
def test_every_fused_operator_has_three_mutants(operator):
    text = (ROOT / "tests/kernels/test_mutants.py").read_text(encoding="utf-8")
    assert len(re.findall(rf'Mutant\(\s*"{operator}"', text)) >= 3


def test_cmake_lists_every_native_source():
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    listed = set(re.findall(r"csrc/[\w./]+\.(?:cpp|cu)\b", text))
    present = {path.relative_to(ROOT).as_posix() for path in sources(".cpp", ".cu")}
    # What tests put before the system's calls is compiled by them.
    assert listed == {name for name in present if name.startswith("csrc/")}


def test_native_sources_do_not_know_torch():
    pattern = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')
    native = sources(".cpp", ".cu", ".h", ".cuh", folders=["csrc"])
    assert [place(path) for path in native if pattern.search(path.read_text("utf-8"))] == []


# ---- files ----


def test_long_files_say_why():
    long = []
    for path in sources(".py", ".cpp", ".cu", ".h", ".cuh"):
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > 600 and not any("Over 600 lines:" in line for line in lines[:40]):
            long.append(f"{place(path)} has {len(lines)} lines")
    assert long == []


def test_no_vague_names():
    vague = {"util", "utils", "helper", "helpers", "misc", "manager", "common"}
    assert [place(path) for path in sources(".py", ".cpp", ".cu") if path.stem in vague] == []


def test_no_paths_of_one_machine():
    personal = re.compile(r"/home/\w+/|/Users/\w+/|/root/")
    found = []
    for path in [
        *sources(".py", ".pyi", ".cpp", ".cu", ".h", ".yaml", ".json", ".md"),
        *(ROOT / name for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "Makefile")),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "configs").rglob("*.yaml"),
    ]:
        text = path.read_text(encoding="utf-8")
        here = str(ROOT) + os.sep in text or str(Path.home()) + os.sep in text
        if path != Path(__file__) and (here or personal.search(text)):
            found.append(place(path))
    assert found == []


def test_documents_name_files_that_exist():
    """Paths in backticks; `fused_thing` and `balance` are CONTRIBUTING's examples."""
    pattern = re.compile(r"`((?:kernels|runtime|goku|csrc|tests|bench|configs|docs)/[\w./-]*)`")
    missing = []
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for name in pattern.findall(document.read_text(encoding="utf-8")):
            if not (
                re.search("fused_thing|balance|triton|results", name) or (ROOT / name).exists()
            ):
                missing.append(f"{place(document)} names {name}")
    assert missing == []


# ---- code ----


def test_public_modules_have_docstrings():
    trees = python_files("kernels", "runtime", "goku", "bench")
    public = [(path, tree) for path, tree in trees if not path.stem.startswith("_")]
    assert [place(path) for path, tree in public if ast.get_docstring(tree) is None] == []


def is_broad(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {kind.id if isinstance(kind, ast.Name) else None for kind in kinds}
    return handler.type is None or bool(names & {"Exception", "BaseException"})


def test_no_exception_is_swallowed():
    """A broad handler may clean up, if its last statement raises again.

    One place gives whatever a decoder raises for a file the name of that file, another hands over
    what is raised in a worker process.
    """
    found = []
    own = {
        "goku/data/errors.py": {
            "raise DecodeError(path, f'cannot be decoded: {reason}') from error"
        },
        # Each hands what was raised to who asked for the result.
        "goku/workers.py": {
            "future.set_exception(error)",
            "return _failure(error)",
            "return _told(error, reason, trace)",
        },
    }
    for path, tree in python_files("kernels", "runtime", "goku", "bench", "tests"):
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and is_broad(node):
                last = node.body[-1]
                named = ast.unparse(last) in own.get(place(path), ())
                if not (named or (isinstance(last, ast.Raise) and last.exc is None)):
                    found.append(place(path, node))
    assert found == []


def test_packages_say_what_they_export():
    found = []
    for path, tree in python_files("kernels", "runtime", "goku"):
        if path.name != "__init__.py":
            continue
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        assigned = [
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        ]
        if any(node.module != "__future__" for node in imports) and "__all__" not in assigned:
            found.append(place(path))
    assert found == []


def test_no_pickle_is_read():
    """torch.load only with weights_only=True, numpy.load never with allow_pickle.

    One place reads what it has just made in memory, to see whether stock DCP could.
    """
    found = []
    own = "pickle.loads(pickled_metadata(plan, metadata, plain))"
    for path, tree in python_files("kernels", "runtime", "goku"):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            unsafe = ast.unparse(node.func) == "torch.load" and given.get("weights_only") != "True"
            if unsafe or given.get("allow_pickle", "False") != "False":
                found.append(place(path, node))
            reads = re.fullmatch(r"(c?pickle|dill|cloudpickle)\.loads?", ast.unparse(node.func))
            if reads and ast.unparse(node) != own:
                found.append(place(path, node))
    assert found == []


IMPORT_PROBE = """
import logging, os, random, signal, sys, threading
import numpy, torch
{libraries}
def state():
    return dict(
        environment=dict(os.environ),
        handlers=list(logging.getLogger().handlers),
        level=logging.getLogger().level,
        signals=[signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)],
        threads=threading.active_count(),
        torch=(torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        group=torch.distributed.is_initialized(),
        random=random.getstate(),
        path=list(sys.path),
    )
before = state()
{ours}
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, changed
"""


def test_nothing_happens_at_import():
    """Importing every module of ours leaves the process as it was.

    What our dependencies do when they are imported is theirs: they come first.
    """
    modules = []
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder / package).rglob("[!_]*.py"):
            name = ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            # Triton's kernels need triton, which no machine without a GPU has to have.
            if ".triton." not in name:
                modules.append(name)
    libraries = ["av", "PIL.Image", "rich.progress", "safetensors.torch", "transformers", "yaml"]
    script = IMPORT_PROBE.format(
        libraries="\n".join(f"import {name}" for name in libraries),
        ours="\n".join(f"import {name}" for name in sorted(modules)),
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- who may import whom ----


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    paths = [tree / "kernels", tree / "runtime", tree]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    return subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path):
    for folder in ("kernels", "runtime", "goku"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_import_contracts_hold(tree):
    done = lint_imports(tree)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("goku/random.py", "import goku.flow", "The layers of goku"),
        ("goku/model/__init__.py", "import goku.trainer", "The layers of goku"),
        ("goku/parallelize.py", "import goku.data", "The layers of goku"),
        ("goku/stray.py", "x = 1", "The layers of goku"),
        ("kernels/goku_kernels/packing.py", "import goku_runtime", "siblings that stand alone"),
        ("runtime/goku_runtime/__init__.py", "import goku_kernels", "siblings that stand alone"),
        ("kernels/goku_kernels/reference.py", "import goku.random", "knows the model"),
        ("runtime/goku_runtime/__init__.py", "import goku", "knows the model"),
    ],
)
def test_a_forbidden_import_is_caught(tree, file, line, contract):
    path = tree / file
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"{before}\n{line}\n", encoding="utf-8")
    done = lint_imports(tree)
    assert done.returncode != 0
    broken = [text for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    assert any(contract in text for text in broken), done.stdout


# ---- versions ----


def test_constraints_lie_within_the_ranges_of_pyproject():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            pins[pin.name.lower()] = specifier.version
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].values()
    checked = 0
    for entry in [*project["dependencies"], *(entry for extra in extras for entry in extra)]:
        wanted = Requirement(entry)
        if wanted.name.lower() in pins:
            assert wanted.specifier.contains(pins[wanted.name.lower()]), entry
            checked += 1
    assert checked >= len(project["dependencies"])
    assert {Requirement(entry).name.lower() for entry in project["dependencies"]} <= set(pins)


def test_no_extra_installs_the_unrelated_apex():
    extras = PYPROJECT["project"]["optional-dependencies"]
    names = {Requirement(entry).name for extra in extras.values() for entry in extra}
    assert "apex" not in names
