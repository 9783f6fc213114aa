"""Decoding with drafts: several tokens of each row are guessed, and one pass of the model decides on all of them."""
