"""Commands: the work of each verb of the command line, one file a verb."""
