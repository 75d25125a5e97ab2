"""`mlvicx doctor`: whether a machine or a cluster is fit for a run, and the remedies."""
