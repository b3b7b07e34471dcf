"""Where computing happens: the array module, the device, the machine, its threads and its ranks."""
