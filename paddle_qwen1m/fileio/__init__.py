"""Files: written whole or not at all, read ahead, and passed on to a device through buffers that it copies from."""
