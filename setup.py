"""Builds the CPU kernel beside the package's metadata in pyproject.toml.

One source, kernels.cpp, is compiled once for each instruction set; the library chooses among them
at run time. It uses neither Python's headers nor PyTorch's, so that one build serves all versions
of both.

ACMIX_NO_NATIVE=1 leaves the kernel out. ACMIX_REQUIRE_NATIVE=1 makes a failed build an error;
without it the install goes on and `acmix info` says why the kernel is missing.
"""

from __future__ import annotations

import os
import platform
import sys
import textwrap
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("src/acmix/csrc")
REASON_FILE = "_kernel_missing.txt"
X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32"
VARIANTS = {"plain": []}
if X86:
    VARIANTS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    VARIANTS["avx512"] = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mf16c",
    ]
# Products and sums may fuse; nothing that changes what NaN or infinity do.
UNIX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
]


def asked(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


class BuildKernel(build_ext):
    """Compiles kernels.cpp once for each instruction set, the other sources once."""

    def build_extension(self, ext: Extension) -> None:
        reason_file = Path(self.get_ext_fullpath(ext.name)).with_name(REASON_FILE)
        reason_file.unlink(missing_ok=True)
        if asked("ACMIX_NO_NATIVE"):
            self.leave_out(ext, reason_file, "installed with ACMIX_NO_NATIVE=1")
            return
        try:
            self.compile_and_link(ext)
        except Exception as error:
            if asked("ACMIX_REQUIRE_NATIVE"):
                raise
            reason = textwrap.shorten(str(error) or type(error).__name__, 120)
            self.leave_out(ext, reason_file, f"it could not be compiled at install: {reason}")

    def leave_out(self, ext: Extension, reason_file: Path, reason: str) -> None:
        self.warn(f"the CPU kernel is left out: {reason}")
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        reason_file.parent.mkdir(parents=True, exist_ok=True)
        reason_file.write_text(reason + "\n")

    def compile_and_link(self, ext: Extension) -> None:
        msvc = self.compiler.compiler_type == "msvc"
        flags = ["/std:c++17", "/O2"] if msvc else UNIX_FLAGS
        kernels = str(CSRC / "simd" / "kernels.cpp")
        objects = self.compiler.compile(
            [source for source in ext.sources if source != kernels],
            output_dir=self.build_temp,
            macros=[("ACMIX_X86_VARIANTS", "1")] if X86 else [],
            include_dirs=ext.include_dirs,
            extra_postargs=flags,
            depends=ext.depends,
        )
        for isa, isa_flags in VARIANTS.items():
            objects += self.compiler.compile(
                [kernels],
                output_dir=str(Path(self.build_temp) / isa),
                macros=[("ACMIX_ISA", isa)],
                include_dirs=ext.include_dirs,
                extra_postargs=[*flags, *isa_flags],
                depends=ext.depends,
            )
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[] if msvc else ["-pthread"],
            target_lang="c++",
        )

    def copy_extensions_to_source(self) -> None:
        """As in an editable install, whether or not there is a library to copy."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            target = Path("src") / self.get_ext_filename(ext.name)
            for source in (built, built.with_name(REASON_FILE)):
                copy = target.with_name(source.name)
                copy.unlink(missing_ok=True)
                if source.exists():
                    self.copy_file(str(source), str(copy))


class AnyPythonWheel(bdist_wheel):
    """The library is loaded by its path and knows nothing of Python: any version will do."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[
        Extension(
            "acmix._kernel",
            sources=[str(p) for p in sorted(CSRC.glob("*/*.cpp"))],
            depends=[str(p) for p in sorted(CSRC.glob("*/*.h"))],
            include_dirs=[str(CSRC)],
            language="c++",
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": AnyPythonWheel},
)
