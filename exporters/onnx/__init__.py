"""ONNX graphs with low-bit weights."""
