"""What a step frees goes back to the system, whatever is left between."""

import os
import subprocess
import sys

import pytest

CODE = """
import torch
from parallel.heap import settle_heap
{call}
def mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
def touched(mib):
    return torch.ones(mib << 20, dtype=torch.uint8)
for _ in range(3):
    touched(31)  # after which glibc, told nothing, takes everything up to there from the heap
held = [touched({each}) for _ in range(320 // {each})]
before = mib()
del held[::2]
print(before - mib())
"""


@pytest.mark.parametrize(
    ("call", "each", "freed"),
    [
        ("settle_heap()", 8, True),
        ("", 8, False),
        ("settle_heap(tight=True)", 2, True),
        ("settle_heap()", 2, False),
    ],
)
def test_no_hole_is_kept(call: str, each: int, freed: bool) -> None:
    libc = os.confstr("CS_GNU_LIBC_VERSION") if sys.platform == "linux" else None
    if libc is None:
        pytest.skip("glibc's allocator is what is settled")
    found = subprocess.run(
        [sys.executable, "-c", CODE.format(call=call, each=each)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(found.stdout) > 120) == freed, found.stdout
