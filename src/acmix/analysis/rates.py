"""Rates in words."""


def rate(per_second: float) -> str:
    """Images/s, in whole ones from ten on, below with two decimals."""
    return f"{per_second:,.{0 if per_second >= 10 else 2}f}"
