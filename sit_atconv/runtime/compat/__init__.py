"""What this package uses of other libraries beyond what they promise: a file for each library.

Above each part stand the versions that it was seen in, the lowest and the highest that pyproject.toml allows, and why
nothing public will do. `tests/runtime/test_compat.py` fails where a part is gone or does something else, and where a
private name is used outside of this folder.
"""
