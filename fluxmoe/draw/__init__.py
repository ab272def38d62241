"""Drawing of figures: a canvas for SVG and PNG, axes and charts.

The package is independent of the data that is drawn, and imports only ``errors``.
"""
