"""Stores of the clean copies of expert pages: host memory, page files, both coded or not."""
