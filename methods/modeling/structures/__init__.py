"""What a compressed decoder can be made of: one module per structure, each with one serialisable shape record."""

# First of all: importing transformers registers the compressed classes, which need every structure, and that must not
# happen halfway through one of them.
import transformers  # noqa: F401
