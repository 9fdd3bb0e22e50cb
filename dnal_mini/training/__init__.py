"""The loop that trains and the devices it runs on; knows no gate."""
