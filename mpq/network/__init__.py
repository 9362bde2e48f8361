"""What is done to a torch model: its layers found, its data, moments and ranges gathered, work shared out."""
