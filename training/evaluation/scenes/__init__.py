"""Read drawn scenes back from pixels and check them against captions."""
