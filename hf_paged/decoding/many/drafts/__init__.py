"""Drafts for rows that come and go."""
