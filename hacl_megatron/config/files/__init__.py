"""Files that a user names: that they are files at all, and that they hold what was written."""
