"""What every test shares: quiet tokenizers, and property tests that are not timed (the machine may be busy)."""

import os

from hypothesis import settings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
