"""GPU support: the driver, frames, streams, page-locked memory, kernels, a fake driver.

No backend uses it yet. Imports the core, stores and codecs; ``fake`` also ``testing.faults``.
"""
