"""Other engines, each run by its own interpreter and measured in turns with this one."""
