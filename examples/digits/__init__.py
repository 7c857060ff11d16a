"""Small-batch detection of handwritten digits: the parts of `detect_digits.py`."""
