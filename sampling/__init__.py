"""Commands: python -m sampling generate | likelihood | speed."""
