"""The weights of a paged model: its own weights are sealed, and ``update`` takes over new ones."""
