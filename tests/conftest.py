"""Shared fixtures: tiny random models of every family, and calibration text for them."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
