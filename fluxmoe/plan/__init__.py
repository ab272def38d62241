"""Planning, which predicts a model's performance for a memory budget without loading the model.

The package imports ``sim`` and the packages below it.
"""
