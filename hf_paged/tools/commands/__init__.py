"""The subcommands of `hf-paged`, a file each.

A file has `add`, which adds the subcommand to a parser and sets `run`, the function that is given its arguments.
"""
