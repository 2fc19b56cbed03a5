"""The configuration: its fields, and how it is read and written."""
