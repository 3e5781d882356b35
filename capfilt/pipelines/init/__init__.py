"""init: a look at the data and at the machine, and a commented recipe that runs as it is."""
