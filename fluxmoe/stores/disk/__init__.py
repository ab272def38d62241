"""Pages on disk: page files, the keys that identify them, and reads and writes of pages."""
