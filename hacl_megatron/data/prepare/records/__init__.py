"""What a record of a JSON file says: its keys, its values, its captions."""
