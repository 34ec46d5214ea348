"""What is trained and compared, as data."""
