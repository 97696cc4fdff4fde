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


def _faults(word: str, **variables: str) -> int:
    environment = {"PATH": "/usr/bin", "JAX_PLATFORMS": "cpu", **variables}
    environment |= {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", _STEPS, word], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_step_on_a_cpu_faults_no_pages_in_again():
    pages = 4096 * 4096 * 4 // 4096
    assert _faults("give back") > pages
    assert _faults("keep") < pages / 8


def test_settings_of_the_user_and_other_platforms_are_left_alone(monkeypatch):
    assert not keep_freed_blocks("gpu")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert not keep_freed_blocks("cpu")
