"""What a step is made of, and what it is made with."""
