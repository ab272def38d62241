"""The weights of a paged model: its own are sealed, new ones are taken over by one door."""
