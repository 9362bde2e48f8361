"""One scheme per layer: what a search chose."""
