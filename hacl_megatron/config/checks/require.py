"""How a check says no: what was found; what to do."""


def require(condition: bool, found: str, remedy: str) -> None:
    """ValueError of one line unless `condition` holds."""
    if not condition:
        raise ValueError(f"{found}; {remedy}")


def dashed(name: str) -> str:
    """A flag as the command line has it."""
    return f"--{name.replace('_', '-')}"
