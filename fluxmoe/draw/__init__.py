"""Drawing of figures: a canvas for SVG and PNG, axes, charts.

Knows nothing of what is drawn; imports ``errors`` only.
"""
