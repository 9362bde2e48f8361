"""Doctests of the four top-level folders run once, under their installed names (mpq.search and its siblings)."""

collect_ignore = ["search", "sensitivity", "proxies", "exporters"]
