"""The commands of depo-train: arguments and run. Nothing imports them but the program's table."""
