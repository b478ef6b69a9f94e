"""The GPU's kernels where there is no GPU: interpreted on the CPU, and compiled for a GPU that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
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
    assert "13 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("kernel", ["_states", "_gradient"])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_kernels_compile_for_the_tensor_cores_of_an_h100(kernel, sigmoid):
    kernel = getattr(tiles_cuda, kernel)
    constants = {
        "DIM": 512,
        "BARRED": 2,
        "DECOUPLED": not sigmoid,
        "SIGMOID": sigmoid,
        "PIECE": tiles_cuda.PIECE,
        "DEPTH": tiles_cuda.DEPTH,
    }
    types = {"x": "*bf16", "y": "*bf16", "g": "*bf16", "n": "i32", "m": "i32", "scale": "fp32", "bias": "fp32"}
    types |= {name: "*i8" for name in ("valid_x", "valid_y")}
    types |= {name: "*i32" for name in ("label_x", "label_y", "id0_x", "id0_y", "id1_x", "id1_y")}
    types |= {name: "*fp32" for name in ("of_rows", "of_columns", "rows", "columns")}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": tiles_cuda.WARPS, "num_stages": tiles_cuda.STAGES}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["ptx"].count(".local .align") == 0  # no logit leaves the registers
    assert compiled.metadata.shared <= 227 << 10
    assert "mma" in compiled.asm["ptx"]
