"""What all tests share: one thread a process and reproducible property tests."""

import os

# Before torch is imported: the workers of `make test` share two cores, and a sum's rounding does
# not depend on how many cores the machine has.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# No deadline: a loaded machine is no failure. Derandomised in continuous integration, so that a
# red run can be repeated; elsewhere every run explores further.
settings.register_profile("goku", deadline=None, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("goku"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "goku")
