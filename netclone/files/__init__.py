"""Files, and what they say: data that anyone may have written."""
