"""What a person runs: the command, evaluations, measurements."""
