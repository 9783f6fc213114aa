"""The ways in which attention reads pages."""
