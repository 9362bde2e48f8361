"""The vocabulary of mpq: formats, layers, tables, problems, allocations and frontiers. Imports nothing else of ours."""
