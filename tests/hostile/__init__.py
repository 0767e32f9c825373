"""Files made to do harm, through everything that opens such files."""
