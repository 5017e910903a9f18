"""What everything stands on: errors, files and their owners, processes, devices, draws, private parts of libraries."""
