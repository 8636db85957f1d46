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
from kernels import conf_loss, tail


def shipped() -> Iterator[tuple[str, object, dict, dict]]:
    """Name, kernel, pointer and number types of the arguments that are not constants, and the constants."""
    fp32 = dict.fromkeys(("norm_ptr", "head_ptr", "logits_ptr", "rstd_ptr", "g_ptr", "sums_ptr"), "*fp32")
    for D, K, hidden, rows, norm in (
        (576, 2, "*fp32", "*i32", "*fp32"),
        (5120, 2, "*bf16", None, None),
        (5120, 2, "*bf16", "*i32", "*bf16"),
        (5120, 8, "*bf16", "*i32", "*fp32"),
        (5120, 32, "*bf16", "*i32", "*fp32"),
    ):
        types = fp32 | {"h_ptr": hidden, "dh_ptr": hidden, "h_stride": "i32", "eps": "fp32", "n_rows": "i32"}
        types |= {"rows_ptr": rows, "norm_ptr": norm, "rstd_ptr": norm and "*fp32"}
        shape, name = {"n_cols": D, "n_classes": K}, f"D={D} K={K} {hidden[1:]}{' norm' if norm else ''}"
        yield f"tail forward  {name}", tail.forward_kernel, types, shape | tail.forward_blocks(D, K)
        rows_each = {"ROWS": tail.SPLIT_ROWS}
        yield f"tail backward {name}", tail.backward_kernel, types, shape | rows_each | tail.backward_blocks(K)
    for mode, number in conf_loss.MODES.items():
        for B, K, coef in (
            (32, 2, "fp32"), (256, 2, "fp32"), (4096, 2, "fp32"), (4096, 2, "*fp32"), (1024, 8, "fp32"),
        ):  # fmt: skip
            if mode != "logconf" or K == 2:
                types = dict.fromkeys(("z_ptr", "y_ptr", "loss_ptr", "dz_ptr", "stats_ptr"), "*fp32")
                types |= dict.fromkeys(("alpha", "beta", "tiny"), "fp32")
                types |= {"coef": coef, "n_rows": "i32", "y_stride": "i32"}
                constants = {"n_classes": K, "MODE": number, "COEF_PER_HEAD": coef[0] == "*", "enable_fp_fusion": False}
                name = f"{mode} B={B} K={K}{' c by head' if coef[0] == '*' else ''}"
                yield f"loss {name}", conf_loss.loss_kernel, types, constants | conf_loss.blocks(B, K)


def compiled(kernel, types: dict, settings: dict) -> tuple[int, int, int]:
    """Registers a thread, bytes spilled (stores and loads), bytes of shared memory of a program."""
    options = {k: v for k, v in settings.items() if k in ("num_warps", "enable_fp_fusion")}
    constants = {k: v for k, v in settings.items() if k not in options}
    constants |= {name: None for name, kind in types.items() if kind is None}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    pointers = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(kernel, signature, {n: v for n, v in constants.items() if n in signature}, pointers)
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
    sys.exit(1 if spilled else 0)


if __name__ == "__main__":
    main()
