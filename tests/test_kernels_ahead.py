"""All kernels compiled for GPUs that are not there: what the machine code contains, and what it takes."""

import re
from functools import cache

import pytest

from dsv3_mini.kernels import compile_for, offers
from dsv3_mini.kernels.ahead import resources

FP8_PRODUCTS = ("fp8_gemm", "fp8_gemm_wgrad", "grouped_fp8_gemm", "grouped_fp8_wgrad")


@cache
def compiled(arch):
    return compile_for(arch)


@pytest.mark.parametrize("arch", [90, 100])
def test_every_kernel_fits_without_spilling(arch):
    kernels = compiled(arch)
    assert len(kernels) == sum(len(cases()) for cases in offers("compile_cases"))  # no name twice
    for name, kernel in kernels.items():
        taken = resources(kernel)
        assert taken.spilled == 0 and 0 < taken.registers * taken.threads <= 65536, (name, taken)
        assert taken.shared <= 227 * 1024, (name, taken)


@pytest.mark.parametrize("name", FP8_PRODUCTS)
def test_hopper_multiplies_e4m3_by_wgmma_from_blocks_that_tma_fetched(name):
    ptx = compiled(90)[name].asm["ptx"]
    shapes = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k32\.f32\.e4m3\.e4m3", ptx)
    assert len(shapes) % 4 == 0 and set(shapes) == {"128"}  # four steps of 32 to a promotion
    assert "cp.async.bulk.tensor" in ptx and "mma.sync" not in ptx


@pytest.mark.parametrize("name", FP8_PRODUCTS)
def test_blackwell_multiplies_e4m3_by_tcgen05(name):
    ptx = compiled(100)[name].asm["ptx"]
    descriptors = re.findall(r"tcgen05\.mma\.cta_group::1\.kind::f8f6f4 \[[^]]+\], \S+ \S+ (%r\d+),", ptx)
    assert len(descriptors) % 4 == 0 and descriptors
    for register in descriptors:
        word = int(re.search(rf"mov\.b32\s+{register}, (\d+);", ptx)[1])
        assert word >> 4 & 3 == 1 and word >> 7 & 7 == 0 and word >> 10 & 7 == 0  # float32 sums, A and B are E4M3


@pytest.mark.parametrize("name", ["act_quant", "act_quant_ue8m0", "weight_quant", "swiglu_quant"])
def test_quantisation_rounds_as_torch_does(name):
    """Division to the nearest number and E4M3 by the hardware's own conversion, to nearest even."""
    ptx = compiled(90)[name].asm["ptx"]
    assert "div.rn.f32" in ptx and "cvt.rn.satfinite.e4m3x2.f32" in ptx


def test_bfloat16_groups_use_wgmma():
    for name in ("grouped_gemm", "grouped_gemm_dgrad"):
        assert "k16.f32.bf16.bf16" in compiled(90)[name].asm["ptx"]


def test_an_architecture_without_e4m3_is_refused():
    with pytest.raises(ValueError, match="arch=80; choose 90 .* or 100"):
        compile_for(80)
