"""What every test shares: quiet tokenizers, one thread, property tests that are not timed (the machine may be busy)."""

import os

from hypothesis import settings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is loaded, here or in a child: on tensors this small threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
