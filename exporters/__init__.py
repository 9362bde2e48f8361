"""Writers of packed weights, one consumer, one file."""
