"""What drops into other libraries, so that they write and read this format."""
