"""Speed, measured on one harness."""
