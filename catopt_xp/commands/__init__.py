"""What the terminal offers: the commands of `catopt-xp`."""
