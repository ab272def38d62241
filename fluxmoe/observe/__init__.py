"""What a running server shows of itself, read from outside."""
