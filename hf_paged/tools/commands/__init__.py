"""The subcommands of `hf-paged`, a file each.

A file has `add`, which adds to a parser what the subcommand takes, and `run`, which is given the arguments. `run` sets
`kept` beside them: what there is to be said of what is done, should it be interrupted.
"""
