"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("clips", deadline=None)  # no test asserts a wall-clock time; the machine may be busy
settings.load_profile("clips")
