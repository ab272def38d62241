"""Stores: where the clean copies of expert pages lie while they are not in a slot."""
