"""`mlvicx plan`: what a run takes on a machine that is not there yet: time, memory, money."""
