"""Drawing of figures: a canvas for SVG and PNG, axes, charts.

Independent of the data that is drawn; imports ``errors`` only.
"""
