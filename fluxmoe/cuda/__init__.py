"""GPU support: the driver, frames, streams, page-locked memory, kernels and a fake driver.

No backend uses this package yet. It imports the core and ``stores``; ``fake`` also imports
``testing.faults``.
"""
