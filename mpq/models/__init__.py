"""Small bundled models, trained and ready."""
