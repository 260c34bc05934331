from helpers import unwritten_memory_is_nan  # noqa: F401  for all tests of this folder
