"""Pages: who holds them, where they are, and which row has which."""
