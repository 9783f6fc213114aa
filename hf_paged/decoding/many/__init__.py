"""Many prompts through one batch that is filled up again as rows end."""
