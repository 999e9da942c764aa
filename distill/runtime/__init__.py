"""What every part stands on: devices, processes, files, the command line."""
