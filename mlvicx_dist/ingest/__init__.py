"""Hospital files to WebDataset shards."""
