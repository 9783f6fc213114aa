"""Arguments that several subcommands take."""


def numbers(text: str) -> tuple[int, ...]:
    """Read `16,64` as `(16, 64)`."""
    return tuple(int(number) for number in text.split(","))
