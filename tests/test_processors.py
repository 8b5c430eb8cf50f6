"""Where NumPy's sorting is slow, and that nothing but the command line's own process is told so."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tadrop_jax import processors, selection

ZEN_4 = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nflags\t\t: fpu avx2 avx512f\n\n"


@pytest.mark.parametrize(
    ("text", "slow"),
    [
        (ZEN_4, True),
        (ZEN_4.replace("avx512f", ""), False),  # Zen 3
        (ZEN_4.replace(": 25", ": 26"), False),  # Zen 5
        (ZEN_4.replace("AuthenticAMD", "GenuineIntel"), False),
        ("", False),
    ],
)
def test_zen_4_is_told_from_others(tmp_path, text, slow):
    (tmp_path / "cpuinfo").write_text(text)
    assert processors.slow_compress(tmp_path / "cpuinfo") is slow


def test_no_description_of_processors(tmp_path):
    assert not processors.slow_compress(tmp_path / "cpuinfo")


@pytest.mark.parametrize("given", [None, "AVX512_ICL"])
@pytest.mark.parametrize("first", ["", "import numpy; "])
def test_avx2_is_asked_for_before_numpy_comes_and_what_a_user_set_stays(given, first):
    code = (
        f"{first}from tadrop_jax import processors; processors.slow_compress = lambda: True; processors.prefer_avx2(); "
        "import os, numpy; print(os.environ.get('NPY_DISABLE_CPU_FEATURES')); numpy.sort(numpy.arange(100.0))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NPY_DISABLE_CPU_FEATURES"}
    if given is not None:
        environment["NPY_DISABLE_CPU_FEATURES"] = given
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    ours = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
    wanted = given or (None if first else "X86_V4 AVX512_ICL" if ours else "AVX512_SKX AVX512_ICL")
    assert found.stdout.strip() == str(wanted)
    assert not found.stderr


@pytest.mark.parametrize("given", [None, "2"])
def test_jax_computes_in_calling_threads_and_what_a_user_set_stays(given):
    """XLA says in a compiled function in how many parts it is split; on one core it never is."""
    code = (
        "from tadrop_jax import processors; processors.compute_in_calling_threads(); import os, jax; "
        "print(os.environ.get('NPROC')); "
        "print(jax.jit(lambda x: x * 2 + 1).lower(jax.ShapeDtypeStruct((8, 1 << 20), 'f')).compile().as_text())"
    )
    # What was compiled for one number of cores is kept for all.
    settings = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment = {k: v for k, v in os.environ.items() if k != "NPROC"} | settings
    if given is not None:
        environment["NPROC"] = given
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    said, text = found.stdout.split("\n", 1)
    assert said == str(given)
    assert ("outer_dimension_partitions" in text) is (given is not None)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_selection_is_exact_whether_partitions_are_fast_or_not(monkeypatch, fast, dtype):
    monkeypatch.setattr(selection, "_partitions_fast", lambda itemsize: fast)
    values = np.random.default_rng(0).standard_normal(1 << 17).astype(dtype)
    k = 12345
    assert selection.kth_largest_magnitude(values, k) == np.sort(np.abs(values))[-k]
