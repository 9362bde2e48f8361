"""Training with quantized weights and activations: for one-shot searches, and for fine-tuning an allocation."""
