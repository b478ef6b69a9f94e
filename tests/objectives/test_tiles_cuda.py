"""The GPU's kernels where there is no GPU: interpreted on the CPU, and compiled for a GPU that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from muser_dist.objectives import tiles_cuda


def test_the_kernels_under_tritons_interpreter():
    path = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-o", "addopts=", str(path)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "17 passed" in done.stdout, done.stdout


# Compute capability, and the shared memory that a block may have there, in KiB: A100, RTX 4090, H100.
CARDS = {80: 163, 89: 99, 90: 227}


@pytest.mark.parametrize(
    ("sigmoid", "dtype", "card"), [(False, torch.bfloat16, 90), (True, torch.bfloat16, 89), (False, torch.float32, 80)]
)
@pytest.mark.parametrize("kernel", ["_states", "_gradient"])
def test_the_kernels_compile_for_cards_that_are_not_here(kernel, sigmoid, dtype, card):
    kernel = getattr(tiles_cuda, kernel)
    constants = {
        "DIM": 512,
        "BARRED": 2,
        "DECOUPLED": not sigmoid,
        "SIGMOID": sigmoid,
        "PIECE": tiles_cuda.PIECE,
        "DEPTH": tiles_cuda.DEPTHS[dtype],
    }
    features = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    types = {"x": features, "y": features, "g": features, "n": "i32", "m": "i32", "scale": "fp32", "bias": "fp32"}
    types |= {name: "*i8" for name in ("valid_x", "valid_y")}
    types |= {name: "*i32" for name in ("label_x", "label_y", "id0_x", "id0_y", "id1_x", "id1_y")}
    types |= {name: "*fp32" for name in ("of_rows", "of_columns", "rows", "columns")}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": tiles_cuda.WARPS, "num_stages": tiles_cuda.STAGES}
    compiled = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    assert compiled.metadata.shared <= CARDS[card] << 10
    assert ("mma" in compiled.asm["ptx"]) == (dtype == torch.bfloat16)  # tensor cores
