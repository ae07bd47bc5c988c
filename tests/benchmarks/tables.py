"""How benchmarks print what the README quotes."""


def table(title: str, columns: list[str], rows: list[list]) -> None:
    """Print as Markdown, floats to three places."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in row)} |")
