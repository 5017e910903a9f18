"""Commands: python -m sampling generate | speed."""
