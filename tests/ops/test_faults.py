"""The tests of the kernels, tested: each deliberate fault in a kernel's source must be caught."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nvae.ops.cuda import kernel_source

from .cases import Case
from .host import HostLauncher
from .test_adamax_kernel import check_adamax, check_average
from .test_host_kernels import (
    WALKED,
    check_batch_norm,
    check_depthwise,
    check_gradients_of_the_last_block,
    check_last_block,
    check_moments,
    check_moments_of_the_last_block,
    check_strided_moments,
)
from .test_weight_norm import check_weight_norms

BFLOAT = torch.bfloat16
ODD = Case(3, 90, 7, 9)
MANY = Case(9, 24, 4, 4, dtype=BFLOAT)
TILES = Case(1, 33, 20, 18)
STRIDED = Case(2, 16, 9, 12, s=2)
LARGE = Case(1, 8, 12, 13, k=7)


class Fault(NamedTuple):
    """``old`` becomes ``new`` in the source of ``kernel``; ``check`` has to fail.

    With ``memory`` the fault is an access out of bounds, which the sanitizers see.
    """

    name: str
    kernel: str
    old: str
    new: str
    check: Callable[[HostLauncher], None]
    memory: bool = False


def depthwise(case: Case) -> Callable[[HostLauncher], None]:
    return lambda host: check_depthwise(case, host)


def bn_swish(case: Case) -> Callable[[HostLauncher], None]:
    return lambda host: check_batch_norm(case, host)


COMMON, FORWARD, BACKWARD = "common", "depthwise_forward", "depthwise_backward"
BARRIERS = [
    (FORWARD, "BN's vectors and the padding are staged", ODD),
    (FORWARD, "tile and weights are staged", ODD),
    (FORWARD, "the tile may be overwritten", TILES),
    (FORWARD, "every group's sums are there", ODD),
    (COMMON, "the block's partial sums are written", WALKED),
    (COMMON, "every share is there", WALKED),
    (COMMON, "the column's sums of g are there", WALKED),
    (BACKWARD, "dsums and the zeros are staged", ODD),
    (BACKWARD, "tiles and weights are staged", ODD),
    (BACKWARD, "the tile may be overwritten", TILES),
    (BACKWARD, "every group's sums are there", TILES),
]
FAULTS = [
    *(
        Fault(f"no barrier: {why}", kernel, f"__syncthreads();  // {why}", "", depthwise(case))
        for kernel, why, case in BARRIERS
    ),
    Fault(
        "no barrier: bn_swish", "bn_swish", "__syncthreads();  // every group's", "//",
        bn_swish(ODD),
    ),
    Fault(
        "no barrier: moments", COMMON, "__syncthreads();  // the column's sums are there", "",
        check_moments_of_the_last_block,
    ),
    Fault(
        "divergent barrier", FORWARD, "__syncthreads();  // the tile may",
        "if (group == 0) __syncthreads();  // the tile may", depthwise(ODD),
    ),
    Fault(
        "padding before BN and Swish", FORWARD, "        if (WHOLE_IMAGE || is_inside) {\n"
        "            const Raw bits = raw[threadIdx.x + u * THREADS];",
        "        {\n            const Raw bits ="
        " is_inside ? raw[threadIdx.x + u * THREADS] : Raw();", depthwise(TILES),
    ),
    Fault("no wait for the copies", FORWARD, "wait_for_copies();", "", depthwise(ODD)),
    Fault("padding of a whole image not written", FORWARD, "if (WHOLE_IMAGE)\n", "if (false)\n",
          depthwise(ODD)),
    Fault("copies outside the image taken for values", FORWARD,
          "activate(a, raw, tile, bn, inside", "activate(a, raw, tile, bn, ~0u",
          depthwise(Case(1, 64, 20, 18, dtype=BFLOAT))),
    Fault("halves of a pixel not flipped back", FORWARD, "(i % 2 ? odd : even) + (r", "even + (r",
          depthwise(Case(1, 64, 9, 9, dtype=BFLOAT))),
    Fault("channels of a position", "common", "position / HALF * 4", "position / HALF * 8",
          depthwise(Case(1, 64, 9, 9, dtype=BFLOAT))),
    Fault("swapped taps", FORWARD, "w[ky * K + kx]", "w[kx * K + ky]", depthwise(ODD)),
    Fault("halo off by one", FORWARD, "% TILES_W * (TW * S) - PAD}",
          "% TILES_W * (TW * S) - PAD + 1}", depthwise(TILES)),
    Fault(
        "stride forgotten", FORWARD, "pw * S) * CB", "pw) * CB", depthwise(STRIDED),
    ),
    Fault(
        "flipped taps, large kernel", FORWARD, "(ky * K + kx) * WEIGHT",
        "(ky * K + K - 1 - kx) * WEIGHT", depthwise(LARGE),
    ),
    Fault(
        "sums of unrounded values", FORWARD, "sum.x += y.x", "sum.x += acc[o][q].x",
        depthwise(Case(1, 1, 2, 2, dtype=BFLOAT)),
    ),
    Fault(
        "only one group's sums", FORWARD, "g < GROUPS; ++g) {\n            const float4",
        "g < 1; ++g) {\n            const float4", depthwise(TILES),
    ),
    Fault(
        "no guard: image, load", FORWARD, "(NB == 1 || at.b + n < a.B) &&", "", depthwise(MANY),
        True,
    ),
    Fault("no guard: image, store", FORWARD, "b >= a.B || c >= C", "c >= C", depthwise(MANY),
          True),
    Fault("no guard: channel, store", FORWARD, "b >= a.B || c >= C", "b >= a.B", depthwise(ODD),
          True),
    Fault("no guard: row", FORWARD, "oh + o < OH && ", "", depthwise(ODD), True),
    Fault("no guard: column", FORWARD, " && ow + q < OW", "", depthwise(ODD), True),
    Fault("no guard: second channel", FORWARD, "acc[o][q], c + 1 < C", "acc[o][q], true",
          depthwise(Case(1, 7, 3, 5)), True),
    Fault("too little shared memory", FORWARD, "WEIGHT_PITCH = CB + 2", "WEIGHT_PITCH = CB + 34",
          depthwise(ODD), True),
    Fault(
        "taps not flipped", BACKWARD, "const int ky = o + K - 1 - r;", "const int ky = r - o;",
        depthwise(ODD),
    ),
    Fault(
        "taps not flipped, large kernel", BACKWARD, "((o + K - 1 - ky) * IW + i)",
        "((o + ky) * IW + i)", depthwise(LARGE),
    ),
    Fault("parity of the stride", BACKWARD, "h % S == 0 &&", "",
          depthwise(Case(1, 8, 20, 18, s=2))),
    Fault("Swish's derivative", BACKWARD, "fmaf(act[o][q].x, 1.f - sx, sx)", "sx", depthwise(ODD)),
    Fault("scale left out", BACKWARD, "make_float2(g.x * scale.x,", "make_float2(g.x,",
          depthwise(ODD)),
    Fault("moment not centered", BACKWARD, "fma2(g, centered, moment)", "fma2(g, x, moment)",
          depthwise(ODD)),
    Fault("half the sums' gradient", BACKWARD, "2 * a.dsums", "a.dsums", depthwise(ODD)),
    Fault("sums' gradient in the padding", BACKWARD,
          "            if (inside[u]) {\n                fl",
          "            if (true) {\n                fl", depthwise(TILES)),
    Fault("activation outside the image", BACKWARD,
          "if (!(FUSED || NEED_DW) || !is_inside(o, q)) continue;", "", depthwise(ODD)),
    Fault("weight gradient: first group alone", BACKWARD,
          "for (int g = 1; g < GROUPS; ++g) total +=", "for (int g = 1; g < 1; ++g) total +=",
          depthwise(TILES)),
    Fault("no wait for x", BACKWARD, "wait_for_copies();", "", depthwise(ODD)),
    Fault("neighbors in odd patches not swapped", BACKWARD, "patch % 2 * CB", "0 * CB",
          depthwise(ODD)),
    Fault("zeros around a whole image not written", BACKWARD, "if (WHOLE_IMAGE)\n", "if (false)\n",
          depthwise(ODD)),
    Fault("halves of a pixel of dy not flipped back", BACKWARD, "(i % 2 ? odd : even) + (r",
          "even + (r", depthwise(Case(1, 64, 9, 9, dtype=BFLOAT))),
    Fault("weight gradient: wrong row of taps", BACKWARD, "first_row * K + i % TAPS", "i % TAPS",
          depthwise(LARGE)),
    Fault("no guard: dx row", BACKWARD, "if (!is_inside(o, q)) continue;\n                    elem",
          "if (w + q >= W) continue;\n                    elem", depthwise(ODD), True),
    Fault("no guard: channels of dw", BACKWARD, "const int live = min(CB, C - c0);",
          "const int live = CB;", depthwise(ODD), True),
    Fault("tail of the pixels", "bn_swish", "const bool inside = p + u * GROUPS < end",
          "const bool inside = true", bn_swish(ODD), True),
    Fault("Swish where there is none", "bn_swish", "out[i] = v;", "out[i] = v * sigmoid(v);",
          bn_swish(ODD)),
    Fault("Swish's derivative where there is none", "bn_swish", "const float g = dy[i];",
          "const float g = dy[i] * sigmoid(v);", bn_swish(ODD)),
    Fault("fold without its constant", "bn_swish", "fmaf(slope[i], x[i], constant[i])",
          "slope[i] * x[i]", bn_swish(ODD)),
    Fault("a row left out", COMMON, "int row = i / VALUES;", "int row = i / VALUES + 1;",
          depthwise(WALKED)),
    Fault("a share left out", COMMON, "share = 1; share < SHARES", "share = 2; share < SHARES",
          depthwise(WALKED)),
    Fault("counters not reset", COMMON, "atomicInc(counter, blocks - 1)", "atomicAdd(counter, 1)",
          check_last_block),
    Fault("no fence before the count", COMMON, "__threadfence();  // what", "//",
          depthwise(WALKED)),
    Fault("the first block adds", COMMON, "blocks - 1) == blocks - 1;", "blocks - 1) == 0;",
          check_last_block),
    # in double, which float32 values of one size leave nearly exact, no order would show
    Fault("rows in the order of arrival, in float", COMMON,
          "total += __ldcg(partial + row * pitch + to);",
          "total = static_cast<float>(total + "
          "__ldcg(partial + (row + blockIdx.x / 2) % rows * pitch + to));", check_last_block),
    Fault("one counter for all columns", FORWARD, "* CHANNEL_BLOCKS + column, a.rows",
          "* CHANNEL_BLOCKS, a.rows", check_last_block),
    Fault("one counter for all columns", BACKWARD, "blockIdx.x % COLUMNS, a.rows", "0, a.rows",
          check_last_block),
    Fault("one counter for all columns", "bn_swish", "* COLUMNS + column, a.rows",
          "* COLUMNS, a.rows", check_last_block),
    Fault("too few counters", BACKWARD, "COUNTER_SLOTS * CHANNEL_BLOCKS * SLICES", "1",
          depthwise(Case(2, 64, 12, 13, k=7)), True),
    Fault("negative variance", COMMON, "raw > 0 ? raw : 0;  //", "raw;  //", check_moments),
    Fault("eps left out", COMMON, "sqrt(var + a.eps)", "sqrt(var)", check_moments),
    Fault("biased running variance", COMMON, "var * (count / (count - 1))", "var",
          check_moments_of_the_last_block),
    Fault("repeats forgotten", COMMON, "count = a.repeats * n;", "count = n;",
          check_moments_of_the_last_block),
    Fault("running mean replaced", COMMON, "a.running_mean[c] += a.momentum * ",
          "a.running_mean[c] += ", check_moments_of_the_last_block),
    Fault("running statistics not asked for", COMMON, "if (!a.running_mean) return;", "",
          check_moments, True),
    Fault("every block moves running statistics", COMMON, "blocks - 1) == blocks - 1;",
          "blocks - 1) >= 0;", check_moments_of_the_last_block),
    Fault("no guard: channels of the moments", COMMON,
          "finish_moments(const Args& a, int c0, int all, double n) {",
          "finish_moments(const Args& a, int c0, int all, double n) {\n    all += CHANNELS;",
          check_moments_of_the_last_block, True),
    Fault("elements of x for y", FORWARD, "static_cast<double>(a.B) * (OH * OW)",
          "static_cast<double>(a.B) * (H * W)", check_strided_moments),
    Fault("elements of a column", "bn_swish", "static_cast<double>(a.P)",
          "static_cast<double>(a.run)", check_moments_of_the_last_block),
    Fault("elements of the host", "vectors", "a.elements ? *a.elements : a.n", "a.n",
          check_moments),
    Fault("elements of the host", COMMON, "elements ? *elements : n", "n", bn_swish(ODD)),
    Fault("gradient through a clamped variance", COMMON, "var > 0 ? -0.5", "true ? -0.5",
          check_gradients_of_the_last_block),
    Fault("gradient of constants", COMMON, "if (!through) continue;", "",
          check_gradients_of_the_last_block, True),
    Fault("mean's part of the second sum", COMMON, " - 2 * mean * dvar) * share", ") * share",
          check_gradients_of_the_last_block),
    Fault("gamma and beta swapped", COMMON, "static_cast<float>(rstd * second)",
          "static_cast<float>(first)", check_gradients_of_the_last_block),
    Fault("a scale kept from another row", "weight_norm", "expf(g[row])", "expf(g[0])",
          check_weight_norms),
    Fault("norm of a part of the row", "weight_norm", "i < LANES; ++i) sum +=",
          "i < LANES - 1; ++i) sum +=", check_weight_norms),
    Fault("gradient along the weight left in", "weight_norm", "fmaf(-shrink, w[i],",
          "fmaf(0.f, w[i],", check_weight_norms),
    Fault("no barrier: weight_norm", "weight_norm", "__syncthreads();", "", check_weight_norms),
    Fault("elements behind the last vector", "adamax", "int i = done + threadIdx.x; i < n",
          "int i = done + threadIdx.x; i < done", check_adamax),
    Fault("every chunk the first", "adamax", "a.chunks[2 * blockIdx.x + 1]", "0LL", check_adamax),
    Fault("alignment not asked", "adamax", "& 15) == 0)", "& 15) != 99)", check_adamax),
    Fault("a step left out is counted", "adamax", "(is_taken ? 1 : 0)", "1", check_adamax),
    Fault("weight decay left out", "adamax", "a.weight_decay * e.weight", "0.f", check_adamax),
    Fault("eps outside the maximum", "adamax", "fabsf(gradient) + a.eps)", "fabsf(gradient))",
          check_adamax),
    Fault("the average follows another weight", "adamax", "share * (e.weight - e.moving)",
          "share * (e.weight - size - e.moving)", check_average),
    Fault("the average of every chunk the first", "adamax", "(entry[5]) + begin", "(entry[5])",
          check_average),
    Fault("rounding to zero", "common", "store_one(elem* p, float v) {\n#if ELEM == 32",
          "store_one(elem* p, float v) {\n    v *= 0.98f;\n#if ELEM == 32",
          depthwise(Case(1, 7, 3, 5))),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=[pytest.mark.exhaustive] if number % 3 else [])
        for number, fault in enumerate(FAULTS)
    ],
    ids=[f"{fault.kernel}: {fault.name}" for fault in FAULTS],
)
def test_fault_is_caught(fault: Fault, host_folder: Path) -> None:
    """A fault that slips through means that the kernels' tests do not look."""
    applied = 0

    def edit(kernel: str, source: str) -> str:
        nonlocal applied
        if fault.kernel in (kernel, "common") and fault.old in source:
            applied += 1
            return source.replace(fault.old, fault.new)
        return source

    host = HostLauncher(host_folder, edit=edit, sanitize=fault.memory)
    with pytest.raises((AssertionError, RuntimeError)):
        fault.check(host)
    assert applied > 0, "the fault's text is no longer in the kernel"


def test_every_barrier_has_its_fault() -> None:
    """A barrier added to a kernel needs its removal on the list."""
    common = kernel_source("vectors").partition("// Moments of a layer whose")[0]
    for kernel in (COMMON, FORWARD, BACKWARD, "bn_swish", "vectors", "weight_norm", "adamax"):
        source = kernel_source(kernel).removeprefix(common) if kernel != COMMON else common
        barriers = source.count("__syncthreads()")
        faults = [f for f in FAULTS if f.kernel == kernel and f.name.startswith("no barrier")]
        assert len(faults) == barriers, kernel
