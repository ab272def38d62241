"""Importing FluxMoE requires no CUDA package."""

import subprocess
import sys

PROGRAM = """
import pkgutil, sys
for name in ("cuda", "nvtx", "pynvml", "cupy"):
    sys.modules[name] = None  # importing it fails
import fluxmoe, fluxmoe.core, fluxmoe.cuda, fluxmoe.stores
for package in (fluxmoe.core, fluxmoe.cuda, fluxmoe.stores):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if "kernels." not in module.name:  # they need Triton
            __import__(module.name)
from fluxmoe.cuda.driver import no_range, nvtx_ranges
assert nvtx_ranges() is no_range
try:
    fluxmoe.cuda.driver.CudaDriver()
except fluxmoe.FluxMoEError as error:
    print(error.code, error.fix)
"""


def test_no_cuda_package_is_needed_until_a_device_is_opened():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("FM404 pip install 'fluxmoe[cuda]'\n", "")
