"""What NumPy and XLA are told of the processor before they start, by programs that have it to themselves.

NumPy has vector code for sorting and partitioning for AVX-512 and for AVX2, and takes the first where it can. That
stores some lanes of a vector at a time, which AMD's Zen 4 does in microcode: a partition takes 7 ns an entry there, and
0.4 with AVX2 (numpy/x86-simd-sort#6).

XLA splits what it computes among threads of its own, one a core. Where threads of the program have the cores already,
each call is handed over and waited for, and the blocks of one go through the caches of all.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

_SWITCH = "NPY_DISABLE_CPU_FEATURES"
_CORES = "NPROC"  # what XLA takes for the number of cores
_CPUINFO = Path("/proc/cpuinfo")


def slow_compress(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether this is a processor of AMD's Zen 4: family 25 with AVX-512. Elsewhere than on Linux, False.

    Args:
      cpuinfo: the kernel's description of the processors.
    """
    try:
        first = cpuinfo.read_text().partition("\n\n")[0]
    except OSError:
        return False
    facts = dict(re.findall(r"^(vendor_id|cpu family|flags)\s*:\s*(.*)$", first, re.MULTILINE))
    amd = facts.get("vendor_id") == "AuthenticAMD" and facts.get("cpu family") == "25"
    return amd and "avx512f" in facts.get("flags", "").split()


def prefer_avx2() -> None:
    """Has NumPy take AVX2 where that is faster; for programs, before anything imports NumPy.

    It changes the environment, and does nothing if NumPy is there already, or if the user has set the variable. NumPy
    ends with an error if it was compiled for AVX-512 alone, so only builds for all processors are asked.
    """
    if "numpy" in sys.modules or _SWITCH in os.environ or not slow_compress():
        return
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        return
    for wheel in Path(spec.origin).parents[1].glob("numpy-*.dist-info/WHEEL"):
        version = tuple(map(int, re.findall(r"\d+", wheel.parent.name)[:2]))
        if "manylinux" in wheel.read_text():
            os.environ[_SWITCH] = "X86_V4 AVX512_ICL" if version >= (2, 4) else "AVX512_SKX AVX512_ICL"


def compute_in_calling_threads() -> None:
    """Has JAX compute in the thread that calls it, on one core; for programs, before JAX's first computation.

    It changes JAX's configuration, and does nothing if JAX has computed already, or if the user has set NPROC.
    """
    if _CORES in os.environ:
        return
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    os.environ[_CORES] = "1"
    try:
        jax.devices()  # XLA looks at it once, when it starts
    finally:
        del os.environ[_CORES]
