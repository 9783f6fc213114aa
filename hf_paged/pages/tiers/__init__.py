"""Where pages go that leave the device."""
