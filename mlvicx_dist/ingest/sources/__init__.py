"""One module a dataset: each lists its images as records."""
