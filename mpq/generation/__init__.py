"""Text from packed language models, token by token."""
