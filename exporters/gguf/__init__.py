"""llama.cpp's files."""
