"""Table, costs, ties and budgets as plain arrays."""
