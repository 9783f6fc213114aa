"""What a person sees of pages: figures in words, and pictures."""
