"""How a compressed model is measured; see docs/ARCHITECTURE.md."""
