"""Compile both kernels for compute capability 9.0, where no GPU is needed, and look at the machine code.

Run by test_kernels.py in a process of its own. Triton's compiler is called below its public interface.
"""

from __future__ import annotations

import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.tools.disasm import get_sass

from admin_fairseq.fast import kernels

TENSORS = ("dy", "f", "x", "omega", "weight", "bias", "y", "df", "dx")


def compiled(kernel: triton.JITFunction, width: int, drop: float) -> dict[str, str]:
    constants = kernels.constants(width, drop, is_scalar=False, is_double=False)
    options = {"num_warps": constants.pop("num_warps")}
    constants.update({"eps": 1e-5} if kernel is kernels._forward else {"OMEGA": True})
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name.endswith("_ptr"):
            signature[name] = "*bf16" if name[:-4] in TENSORS else "*fp32"
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = {"rows": "i32", "seed": "i64"}.get(name, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


for width in (512, 1024, 1000):
    for kernel in (kernels._forward, kernels._backward):
        asm = compiled(kernel, width, 0.1)
        vectors = re.findall(r"(ld|st)\.global[.\w]*\.v4\.b32", asm["ptx"])
        # f and x to y; dy, f and x to df and dx
        minimum = {"ld": 2, "st": 1} if kernel is kernels._forward else {"ld": 3, "st": 2}
        assert all(vectors.count(what) >= count for what, count in minimum.items()), (kernel, width, vectors)
        assert not re.search(r"\b(LDL|STL)\b", get_sass(asm["cubin"])), (kernel, width)
