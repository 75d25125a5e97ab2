"""`mlvicx export`: an encoder as a folder that others load, with what is known of it."""
