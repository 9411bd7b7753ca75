"""Run a Triton kernel where its tensors are: compiled on a GPU, block by block in Triton's interpreter on a CPU.

Generated from chapters/15_triton_fp8.ipynb; edit the chapter, not this file.
"""

import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor

# What is a kernel, and who runs it here?


try:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"Triton has no wheel for this platform ({platform.system()}, {platform.machine()}), or is not installed: "
        "dsv3_mini.kernels needs it (on Linux: pip install triton), the rest of dsv3_mini does not"
    ) from error


def float_types() -> dict[tl.dtype, torch.dtype]:
    """Triton's floats by torch's names."""
    narrow = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2, tl.bfloat16: torch.bfloat16}
    return narrow | {tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64}


def cast_by_torch(block: "interpreter.TensorHandle", dtype: tl.dtype) -> "interpreter.TensorHandle":
    """Round a block as torch does. The interpreter holds floats that numpy lacks as unsigned bits."""
    types, target = float_types(), dtype.scalar
    value = torch.from_numpy(block.data.copy()).view(types[block.dtype.scalar]).to(types[target])
    bits = {1: torch.uint8, 2: torch.uint16}.get(value.itemsize)
    numpy_holds_it = target in (tl.float16, tl.float32, tl.float64)
    return interpreter.TensorHandle((value if numpy_holds_it else value.view(bits)).numpy(), target)


class MendedBuilder(interpreter.InterpreterBuilder):
    """Triton's interpreter with the three operations replaced that are wrong in 3.9.0 (compiled kernels are right).

    float32 -> E4M3 drops the carry of rounding, so 127.9 becomes 64; float32 -> bfloat16 truncates; a product of
    bfloat16 blocks multiplies their bit patterns as integers. `test_upstream_*` goes red when one is mended.
    """

    def create_fp_to_fp(self, block, dtype, rounding):
        return cast_by_torch(block, dtype)

    def create_fp_trunc(self, block, dtype):
        return cast_by_torch(block, dtype)

    def create_dot(self, a, b, acc, precision, max_imprecise):
        a, b = (cast_by_torch(block, tl.float32) for block in (a, b))
        return super().create_dot(a, b, acc, precision, max_imprecise)


@contextmanager
def interpreting() -> Iterator[None]:
    """Inside, kernels decorated with plain @triton.jit may be interpreted, and call each other.

    Outside they compile as ever, so one process can do both and TRITON_INTERPRET is not needed.
    """
    stock_patch = interpreter._patch_lang_tensor

    def call(self, *args, **kwargs):
        return interpreter.InterpretedFunction(self.fn).rewrite()(*args, **kwargs)

    def patch_tensor(tensor, scope):
        stock_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # 3.6 does it as numpy 2.4 forbids

    with ExitStack() as stack:
        for place, name, value in (
            (interpreter.interpreter_builder, "__class__", MendedBuilder),
            (triton.runtime.jit.JITFunction, "__call__", call),
            (interpreter, "_patch_lang_tensor", patch_tensor),
        ):
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        for user in (triton.language.standard.cdiv.fn, float_types):  # the language as their modules import it
            stack.callback(interpreter._patch_lang(user).restore)
        stack.enter_context(np.errstate(all="ignore"))  # a GPU does not warn of an overflow either
        yield


def launch(
    kernel, grid: tuple[int, ...], *args, num_warps: int = 4, num_stages: int = 3, interpret: bool | None = None, **meta
) -> None:
    """Run `kernel` for every program of `grid`; an empty grid runs nothing.

    args: the kernel's tensors and numbers in order; meta: its compile-time constants. interpret: None follows the
    tensors (CPU: interpreter, GPU: compiled). Raises ValueError where they lie on several devices, or on the CPU with
    interpret=False.
    """
    tensors = [tensor for arg in args if isinstance(tensor := getattr(arg, "base", arg), Tensor)]
    places = {f"{tuple(tensor.shape)} on {tensor.device}": tensor.device for tensor in tensors}
    if len(set(places.values())) != 1:
        raise ValueError(f"{kernel.__name__} needs all its tensors on one device: {', '.join(places)}")
    device = tensors[0].device
    if interpret is False and device.type == "cpu":
        raise ValueError(f"a compiled {kernel.__name__} cannot read CPU memory: {', '.join(places)}; move it to a GPU")
    if 0 in grid:
        return
    if interpret or device.type == "cpu":
        with interpreting():
            interpreter.InterpretedFunction(kernel.fn)[grid](*args, **meta)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **meta, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


def in_blocks(x: Tensor, *shape: int) -> TensorDescriptor:
    """A tensor that a kernel loads in blocks of `shape` by coordinates: on the GPU its copy engine does (TMA)."""
    return TensorDescriptor.from_tensor(x, list(shape))


def expect(name: str, x: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """Refuse a tensor of another shape or type (None: any size, no dtypes: any type), naming both."""
    fits = x.dim() == len(shape) and all(want in (None, have) for want, have in zip(shape, x.shape, strict=True))
    if not fits or (dtypes and x.dtype not in dtypes):
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        types = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {tuple(x.shape)} of {x.dtype}; {wanted}{f' of {types}' if types else ''} needed")
