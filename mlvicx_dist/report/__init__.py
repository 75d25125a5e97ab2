"""Evidence to pages and plots."""
