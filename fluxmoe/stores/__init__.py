"""Stores that hold clean copies of expert pages in host memory or in page files.

Both kinds can encode the pages with a codec. This package imports the core, ``checkpoint``,
``inventory`` and ``hookspecs``.
"""
