"""Maps the three import packages and builds the extension modules with CMake.

Everything declarative stands in pyproject.toml, and the list of C++ and CUDA sources in
CMakeLists.txt alone. This file only joins the two: it runs CMake (Ninja generator) and puts
whatever CMake installs beside the Python files of the package that it belongs to.

Environment:
    GOKU_CUDA   0 never builds the CUDA module, 1 requires nvcc for it, auto (the default) builds it
                when nvcc is found; there is none to build before the first CUDA source
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# Import package -> folder that holds it. The folders `kernels` and `runtime` are no packages
# themselves: a top-level package named `kernels` would shadow Hugging Face's, which transformers
# and diffusers import.
PACKAGE_ROOTS = {"goku_kernels": "kernels", "goku_runtime": "runtime", "goku": "."}


class BuildWithCMake(build_ext):
    """Runs CMake once and distributes what it installed.

    CMake decides which modules exist (the CUDA module depends on nvcc), so the outputs are read
    from its install tree, which is laid out by import package: goku_runtime/_io.*.so and so on.
    """

    def _stage(self) -> Path:
        return Path(self.build_temp).resolve() / "stage"

    def _destination(self, built: Path) -> Path:
        package, *rest = built.relative_to(self._stage()).parts
        if self.inplace or self.editable_mode:
            return ROOT.joinpath(PACKAGE_ROOTS[package], package, *rest)
        return Path(self.build_lib).resolve().joinpath(package, *rest)

    def _built(self) -> list[Path]:
        return sorted(path for path in self._stage().rglob("*") if path.is_file())

    def run(self) -> None:
        import pybind11

        cuda = os.environ.get("GOKU_CUDA", "auto").strip().lower()
        if cuda not in ("0", "1", "auto"):
            raise ValueError(f"GOKU_CUDA is {cuda!r}; allowed are 0, 1 and auto")
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._stage(), ignore_errors=True)
        # --fresh: under build isolation cmake, ninja and pybind11 live at a new path every time,
        # and a cache that remembers the last one would fail. Object files survive it.
        configure = [
            "cmake",
            "--fresh",
            *("-S", str(ROOT)),
            *("-B", str(build)),
            *("-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            "-DCMAKE_INSTALL_PREFIX=" + str(self._stage()),
            "-DPython_EXECUTABLE=" + sys.executable,
            "-Dpybind11_DIR=" + pybind11.get_cmake_dir(),
            "-DGOKU_CUDA=" + cuda,
        ]
        for command in (
            configure,
            ["cmake", "--build", str(build)],
            ["cmake", "--install", str(build)],
        ):
            subprocess.run(command, check=True)
        for built in self._built():
            destination = self._destination(built)
            destination.parent.mkdir(parents=True, exist_ok=True)
            # Replaced, not overwritten: a running process may have the old module mapped.
            partial = destination.with_name(destination.name + ".partial")
            shutil.copy2(built, partial)
            partial.replace(destination)

    def get_outputs(self) -> list[str]:
        return [str(self._destination(built)) for built in self._built()]

    def get_output_mapping(self) -> dict[str, str]:
        # Only a strict editable install asks: build directory -> source tree. In place there is no
        # copy.
        return {}


def subpackages(name: str, folder: str) -> list[str]:
    """The package and what lies under it; always the top one, which an editable install maps."""
    found = find_packages(str(ROOT / folder), include=[name, f"{name}.*"])
    return sorted({name, *found})


setup(
    packages=[
        package for name, folder in PACKAGE_ROOTS.items() for package in subpackages(name, folder)
    ],
    package_dir={
        name: f"{folder}/{name}" if folder != "." else name
        for name, folder in PACKAGE_ROOTS.items()
    },
    package_data={
        "goku_kernels": ["py.typed", "*.pyi", "**/*.json"],
        "goku_runtime": ["py.typed", "*.pyi", "**/*.json"],
        "goku": ["py.typed", "**/*.yaml", "**/*.json"],
    },
    # No sources: CMake knows them. The entry marks the wheel as belonging to this platform.
    ext_modules=[Extension("goku_runtime._io", sources=[])],
    cmdclass={"build_ext": BuildWithCMake},
    zip_safe=False,
)
