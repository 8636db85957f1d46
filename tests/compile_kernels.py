"""Compile every kernel for sm_90 at the shipped block sizes, without a GPU: registers, spilled bytes, shared memory.

python tests/compile_kernels.py        one line a kernel and configuration; exit code 1 where registers spill
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import conf_loss, head


def shipped() -> Iterator[tuple[str, object, dict, dict]]:
    """Name, kernel, pointer and number types of the arguments that are not constants, and the constants."""
    fp32 = dict.fromkeys(("weight_ptr", "logits_ptr", "g_ptr", "sums_ptr"), "*fp32")
    for D, K, hidden in ((576, 2, "*fp32"), (5120, 2, "*bf16"), (5120, 8, "*bf16"), (5120, 32, "*bf16")):
        types = fp32 | {"h_ptr": hidden, "dh_ptr": hidden, "rows_ptr": "*i32", "h_stride": "i32", "n_rows": "i32"}
        shape, name = {"n_cols": D, "n_classes": K}, f"D={D} K={K} {hidden[1:]}"
        yield f"head forward  {name}", head.forward_kernel, types, shape | head.forward_blocks(D, K)
        shape |= {"ROWS": head.SPLIT_ROWS}
        yield f"head backward {name}", head.backward_kernel, types, shape | head.backward_blocks(K)
    for mode, number in conf_loss.MODES.items():
        for B, K in ((32, 2), (256, 2), (4096, 2), (1024, 8)):
            if mode != "logconf" or K == 2:
                types = dict.fromkeys(("z_ptr", "y_ptr", "loss_ptr", "dz_ptr"), "*fp32")
                types |= dict.fromkeys(("coef", "alpha", "beta", "tiny"), "fp32") | {"n_rows": "i32"}
                constants = {"n_classes": K, "MODE": number}
                yield f"loss {mode} B={B} K={K}", conf_loss.loss_kernel, types, constants | conf_loss.blocks(B, K)


def compiled(kernel, types: dict, settings: dict) -> tuple[int, int, int]:
    """Registers a thread, bytes spilled (stores and loads), bytes of shared memory of a program."""
    options = {k: v for k, v in settings.items() if k in ("num_warps", "enable_fp_fusion")}
    constants = {k: v for k, v in settings.items() if k not in options}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    pointers = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(kernel, signature, constants, pointers)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    said = said.getvalue()
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return int(re.search(r"Used (\d+) registers", said)[1]), spills, binary.metadata.shared


def main() -> None:
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    spilled = False
    print(f"triton {triton.__version__}, sm_90: registers a thread, bytes spilled, bytes of shared memory, warps")
    for name, kernel, types, settings in shipped():
        registers, spills, shared = compiled(kernel, types, settings)
        spilled |= spills > 0
        print(f"{name:50} {registers:4} {spills:5} {shared:7} {settings['num_warps']:3}", flush=True)
    sys.exit(spilled)


if __name__ == "__main__":
    main()
