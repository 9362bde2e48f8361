"""Training with quantized weights and activations, for one-shot searches and fine-tuning."""
