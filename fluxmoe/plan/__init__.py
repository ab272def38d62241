"""What a budget of memory is worth for a model on a machine, before anything is loaded."""
