"""Pages on disk: page files, which are found by a key, and reads and writes of page files."""
