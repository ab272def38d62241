"""Built-in arbitration policies, one file each."""
