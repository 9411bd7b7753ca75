"""Compile Triton kernels for a GPU that is not there, and read what the compiler says of them.

Generated from chapters/15_triton_fp8.ipynb; edit the chapter, not this file.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dsv3_mini.kernels.interpreter import interpreter, triton

# What will the GPU execute?


class Case(NamedTuple):
    """A kernel with all that its machine code depends on; `compile_case` makes it.

    signature: each argument's type in order: "*bf16" and so on for tensors, "i32" and "fp32" for numbers; a trailing
    ":16" promises a multiple of 16 (an address or a stride). constexprs: every other argument's value.
    """

    kernel: Callable
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3


def compile_case(case: Case, arch: int):
    """Machine code for sm_<arch>, without a GPU: `.asm["ptx"]`, `.asm["cubin"]`, `.metadata.shared` (bytes)."""
    if isinstance(case.kernel, interpreter.InterpretedFunction):
        raise ValueError("TRITON_INTERPRET is set, so kernels cannot be compiled; unset it: CPU runs do without")
    types, attrs = {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        kind, _, multiple = case.signature.get(name, "constexpr").partition(":")
        types[name] = kind
        if multiple:
            attrs[(index,)] = [["tt.divisibility", int(multiple)]]
    source = triton.compiler.ASTSource(case.kernel, types, case.constexprs, attrs)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


class Resources(NamedTuple):
    """What one compiled kernel takes of a multiprocessor."""

    registers: int  # of each thread; at most 255
    spilled: int  # bytes a thread keeps in slow memory because registers ran out
    shared: int  # bytes of shared memory a program
    threads: int  # of a program


def resources(compiled) -> Resources:
    """Read what NVIDIA's own cuobjdump, which comes with triton, says of the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    threads = 32 * compiled.metadata.num_warps
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared, threads)
