"""From the checkout to an installed package: sdist, wheel, clean environment, neighbours."""

import email.parser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"goku_kernels": "kernels", "goku_runtime": "runtime", "goku": "."}
CHECK_VALUE = 0xE3069283  # CRC-32C of b"123456789"
NOT_SOURCES = shutil.ignore_patterns(
    *(".git", ".venv", "build", "dist", "demo-out", "runs", "*.egg-info", "*.so", "__pycache__"),
    *(".*_cache", ".hypothesis"),
)


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    expect: int | None = 0,
) -> str:
    """The output of a command, which has to end with the expected exit code (None: any but 0)."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=dict(env) if env is not None else clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    failed = done.returncode == 0 if expect is None else done.returncode != expect
    assert not failed, f"{command} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without what leads Python or the build astray."""
    drop = ("PYTHONPATH", "PYTHONHOME", "GOKU_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return kept | changes


def path_without(program: str, folder: Path) -> str:
    """PATH with `program` hidden: where it lies, a folder of links to everything else instead."""
    parts = []
    for number, part in enumerate(os.environ["PATH"].split(os.pathsep)):
        if not (Path(part) / program).exists():
            parts.append(part)
            continue
        links = folder / str(number)
        links.mkdir(parents=True)
        for tool in Path(part).iterdir():
            if tool.name != program:
                (links / tool.name).symlink_to(tool)
        parts.append(str(links))
    return os.pathsep.join(parts)


def environment(folder: Path, *, borrow: bool) -> Path:
    """A new virtual environment's Python.

    borrow: it also sees the packages of this interpreter (torch and so on), which nobody wants to
    download again; but not the editable install among them, whose hook a path entry does not run.
    """
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    if borrow:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def copy_of_the_checkout(folder: Path) -> Path:
    shutil.copytree(ROOT, folder, ignore=NOT_SOURCES)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, so that nothing is built inside the checkout itself."""
    return copy_of_the_checkout(tmp_path_factory.mktemp("copy") / "goku")


@pytest.fixture(scope="module")
def distributions(checkout, tmp_path_factory) -> tuple[Path, Path]:
    """sdist, and the wheel made from it, with pip's ordinary build isolation and nvcc as it is."""
    out = tmp_path_factory.mktemp("dist")
    # Nothing is compiled for an sdist: it needs no isolated environment of its own.
    run([sys.executable, "-m", "build", "--sdist", "-n", "--outdir", out, checkout], cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", sdist], cwd=out)
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def sdist(distributions) -> Path:
    return distributions[0]


@pytest.fixture(scope="module")
def wheel(distributions) -> Path:
    return distributions[1]


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


# ---- what is in the wheel ----


def test_wheel_holds_the_three_packages_and_nothing_else(wheel):
    tops = {name.split("/")[0] for name in files_in(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_wheel_holds_every_source_file(wheel, checkout):
    expected = set()
    for package, folder in PACKAGES.items():
        base = checkout / folder
        for path in (base / package).rglob("*"):
            if path.suffix in (".py", ".pyi", ".yaml", ".json") or path.name == "py.typed":
                expected.add(path.relative_to(base).as_posix())
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected
    assert expected - files_in(wheel) == set()


def test_metadata_says_what_pyproject_says(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith("/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(name).decode())
        scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Version"] == "0.1.0"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.14"}
    requirements = metadata.get_all("Requires-Dist", [])
    assert any(entry.replace(" ", "") == "torch<2.14,>=2.11" for entry in requirements)
    assert not any(entry.startswith("apex") for entry in requirements)
    assert "goku = goku.cli:main" in scripts


# ---- installed ----

PROBE = """
import importlib.util, json, pathlib, sys
import goku, goku_kernels, goku_runtime
from goku_runtime import _io
modules = [goku, goku_kernels, goku_runtime]
print(json.dumps({
    "crc": _io.crc32c(b"123456789"),
    "files": [m.__file__ for m in [*modules, _io]],
    "typed": [(pathlib.Path(m.__file__).parent / "py.typed").is_file() for m in modules],
    "stray": [name for name in ("kernels", "runtime", "csrc") if importlib.util.find_spec(name)],
}))
"""


def check_installed(python: Path, folder: Path) -> None:
    """The three packages are the installed ones and complete; the checksum is right."""
    found = json.loads(run([python, "-c", PROBE], cwd=folder).splitlines()[-1])
    assert found["crc"] == CHECK_VALUE
    assert found["typed"] == [True, True, True]
    assert found["stray"] == []
    site = python.parent.parent
    assert [name for name in found["files"] if site not in Path(name).parents] == []


@pytest.mark.slow
def test_wheel_in_a_clean_environment(wheel, tmp_path):
    python = environment(tmp_path / "venv", borrow=True)
    run([python, "-m", "pip", "install", "--no-deps", wheel], cwd=tmp_path)
    check_installed(python, tmp_path)


@pytest.mark.long
@pytest.mark.slow
def test_sdist_without_nvcc(sdist, tmp_path):
    path = path_without("nvcc", tmp_path / "path")
    assert shutil.which("nvcc", path=path) is None
    python = environment(tmp_path / "venv", borrow=True)
    environ = clean_environment(PATH=path)
    run([python, "-m", "pip", "install", "--no-deps", sdist], cwd=tmp_path, env=environ)
    check_installed(python, tmp_path)


def interpreter(version: str) -> Path | None:
    """A Python of this version that starts, from the PATH or from pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    built = pyenv.glob(f"versions/{version}.*/bin/python3")
    candidates = [shutil.which(f"python{version}"), *built]
    for candidate in filter(None, candidates):
        # A pyenv shim on the PATH exists for versions that are not switched on, and then fails.
        done = subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True)
        if done.returncode == 0:
            return Path(candidate)
    return None


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_other_pythons(version, sdist, tmp_path):
    """The module builds and computes; torch, which is not to be had for every Python, stays out."""
    found = interpreter(version)
    if found is None:
        pytest.skip(f"needs Python {version}")
    run([found, "-m", "venv", tmp_path / "venv"], cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run([python, "-m", "pip", "install", "--no-deps", sdist], cwd=tmp_path)
    script = (
        "import importlib.util as u, sysconfig, pathlib\n"
        "path, = pathlib.Path(sysconfig.get_path('platlib'), 'goku_runtime').glob('_io.*.so')\n"
        "spec = u.spec_from_file_location('goku_runtime._io', path)\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.crc32c(b'123456789'))\n"
    )
    assert int(run([python, "-c", script], cwd=tmp_path)) == CHECK_VALUE


# ---- the CUDA module's place ----

TOY_KERNEL = """
#include <pybind11/pybind11.h>
__global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }
PYBIND11_MODULE(_cuda, m) { m.def("answer", [] { return 42; }); }
"""


@pytest.fixture(scope="module")
def checkout_with_a_kernel(tmp_path_factory) -> Path:
    """A checkout with one CUDA source more, as a kernel adds it; what is compiled stays in it."""
    folder = copy_of_the_checkout(tmp_path_factory.mktemp("kernel") / "goku")
    (folder / "csrc" / "toy.cu").write_text(TOY_KERNEL)
    cmake = folder / "CMakeLists.txt"
    text = cmake.read_text()
    assert text.count("set(GOKU_CUDA_SOURCES\n") == 1
    cmake.write_text(text.replace("set(GOKU_CUDA_SOURCES\n", "set(GOKU_CUDA_SOURCES csrc/toy.cu\n"))
    return folder


def build_in_place(checkout: Path, expect: int | None = 0, **environ: str) -> str:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    # cmake and ninja are the ones that stand beside this interpreter.
    tools = f"{Path(sys.executable).parent}{os.pathsep}{environ.pop('PATH', os.environ['PATH'])}"
    output = run(command, cwd=checkout, env=clean_environment(PATH=tools, **environ), expect=expect)
    return " ".join(output.split())  # CMake wraps its messages


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_sources_are_built_with_nvcc(checkout_with_a_kernel, tmp_path):
    checkout = checkout_with_a_kernel
    output = build_in_place(checkout)
    (module,) = (checkout / "kernels" / "goku_kernels").glob("_cuda.*.so")
    script = (
        "import importlib.util as u, sys\n"
        "spec = u.spec_from_file_location('goku_kernels._cuda', sys.argv[1])\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.answer())\n"
    )
    assert int(run([sys.executable, "-c", script, module], cwd=tmp_path)) == 42
    assert "for 80;90a;100a" in output


@pytest.mark.long
def test_cuda_sources_without_nvcc(checkout_with_a_kernel, tmp_path):
    """auto goes on without the module and says so, 1 refuses and names the remedy, 0 is silent."""
    checkout = checkout_with_a_kernel
    for module in (checkout / "kernels" / "goku_kernels").glob("_cuda.*.so"):
        module.unlink()
    path = path_without("nvcc", tmp_path / "path")
    assert "no nvcc found, not built" in build_in_place(checkout, PATH=path)
    assert list((checkout / "runtime" / "goku_runtime").glob("_io.*.so"))
    assert not list((checkout / "kernels" / "goku_kernels").glob("_cuda.*.so"))
    assert "put it on the PATH" in build_in_place(checkout, expect=None, PATH=path, GOKU_CUDA="1")
    assert "turned off by GOKU_CUDA=0" in build_in_place(checkout, PATH=path, GOKU_CUDA="0")
    refused = build_in_place(checkout, expect=None, GOKU_CUDA="yes")
    assert "GOKU_CUDA is 'yes'; allowed are 0, 1 and auto" in refused


# ---- neighbours: the folder kernels/ is not Hugging Face's package ----


def test_import_kernels_is_the_installed_package(tmp_path):
    """From the repository root, where the folder kernels/ stands first on the path."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("def get_kernel(name): return name\n")
    script = "import kernels, goku_kernels; print(kernels.get_kernel('theirs'), kernels.__file__)"
    environ = clean_environment(PYTHONPATH=str(tmp_path))
    output = run([sys.executable, "-c", script], cwd=ROOT, env=environ)
    assert output.split() == ["theirs", str(package / "__init__.py")]


@pytest.mark.long
def test_transformers_beside_the_folder(tmp_path):
    script = "from transformers import T5EncoderModel; print(T5EncoderModel.__name__)"
    assert run([sys.executable, "-c", script], cwd=ROOT).split()[-1] == "T5EncoderModel"


@pytest.mark.long
@pytest.mark.slow
def test_real_neighbours(tmp_path):
    """Hugging Face's kernels, transformers and diffusers themselves, from the repository root."""
    python = environment(tmp_path / "venv", borrow=True)
    install = [python, "-m", "pip", "install", "-c", ROOT / "constraints.txt"]
    run([*install, "kernels", "diffusers"], cwd=tmp_path)
    script = (
        "import kernels; from transformers import T5EncoderModel; import diffusers\n"
        "from diffusers import WanTransformer3DModel\n"
        "print(kernels.get_kernel.__module__, kernels.__file__)\n"
    )
    module, file = run([python, "-c", script], cwd=ROOT).split()[-2:]
    assert module.split(".")[0] == "kernels"
    assert tmp_path in Path(file).parents


# ---- the Makefile's first words ----


def test_make_refuses_another_python(tmp_path):
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo Python 3.9.1; exit 0; }\nexit 1\n')
    python.chmod(0o755)
    command = ["make", "demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    output = run(command, cwd=ROOT, expect=2)
    assert f"Goku needs Python 3.11, 3.12 or 3.13; {python} is Python 3.9.1" in output
    assert not (tmp_path / "venv").exists()
