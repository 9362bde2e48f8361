"""Mixed-precision quantization search."""
