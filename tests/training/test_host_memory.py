"""Steps on a CPU keep their memory: a second one faults no pages in."""

import subprocess
import sys

import pytest

from jaxlora.training.host_memory import keep_freed_blocks

# In a process of its own: malloc's settings last for as long as it does.
_STEPS = """
import resource, sys
import jax, jax.numpy as jnp
from jaxlora.training.host_memory import keep_freed_blocks, run_where_called

run_where_called()
x = jnp.ones((4096, 16))
step = jax.jit(lambda x: jnp.sum((x @ x.T) @ x))  # 64 MiB between the two products
step(x).block_until_ready()
if sys.argv[1] == "keep":
    assert keep_freed_blocks("cpu")
for _ in range(3):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# Blocks too small to be mapped, all freed but the last, which keeps the heap's end.
_FREED = """
import jaxlora.training.host_memory as host_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1])

blocks = [bytearray(2**16) for _ in range(2**11)]  # 128 MiB
last = bytearray(2**16)
del blocks
before = resident()
assert host_memory.release_freed_blocks()
print(before - resident())
"""


def _printed(program: str, *words: str, **variables: str) -> int:
    environment = {"PATH": "/usr/bin", "JAX_PLATFORMS": "cpu", **variables}
    environment |= {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_step_on_a_cpu_faults_no_pages_in_again():
    pages = 4096 * 4096 * 4 // 4096
    assert _printed(_STEPS, "give back") > pages
    assert _printed(_STEPS, "keep") < pages / 8


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_what_a_compiler_left_goes_back():
    assert _printed(_FREED) > 0.9 * 2**27 / 4096


def test_settings_of_the_user_and_other_platforms_are_left_alone(monkeypatch):
    assert not keep_freed_blocks("gpu")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert not keep_freed_blocks("cpu")
