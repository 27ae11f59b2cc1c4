"""What weights are made of: bytes to numbers, one module per format."""
