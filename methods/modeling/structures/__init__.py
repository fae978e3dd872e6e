"""What a compressed decoder can be made of: one module per structure, each with one serialisable shape record."""
